"""The six vision-language data modules on stand-ins in the published layouts."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict, Image, disable_progress_bars, load_dataset

from datamodules.base import IGNORED
from datamodules.joint import JointDataModule
from datamodules.sources import open_source
from datamodules.twins.models import write_llava
from datamodules.twins.pictures import draw, png
from datamodules.twins.vlm import write_vlm
from datamodules.vlm import VLMDataModule
from datamodules.vlm_sources import SPECS
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

#: 20 pictures per published split: samples of train, val and test.
SIZES = {
    "vizwiz": (20, 4, 16),
    "iconqa": (20, 4, 16),
    "chartqa": (20, 20, 20),
    "docvqa": (20, 4, 16),
    "coco": (20, 20, 20),
    "flickr30k": (20, 20, 20),
}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        yield str(write_llava(root / "base")), write_vlm(root / "data")["coco"].parent


@pytest.fixture
def opened(folders):
    base, data = folders

    def open_task(task, source=None, **options):
        module = VLMDataModule(task, base, str(source or data / task), **options)
        module.setup()
        return module

    return open_task


def answer_of(module, sample):
    tokenizer = module._encoder.tokenizer
    return tokenizer.decode(sample["target"][sample["target"] != IGNORED], skip_special_tokens=True)


@pytest.mark.parametrize("task", SIZES)
def test_samples_of_every_task(opened, task):
    module = opened(task)
    for split, size in zip(SPLITS, SIZES[task], strict=True):
        dataset = module.dataset(split)
        assert len(dataset) == size
        for sample in (dataset[i] for i in range(size)):
            assert sample.keys() == {"input_ids", "attention_mask", "pixel_values", "target"}
            assert sample["pixel_values"].shape == (3, 28, 28)
            assert sample["target"]
            assert all(isinstance(answer, str) for answer in sample["target"])
        learned = module.supervised(split)
        assert len(learned) == size * (5 if task in ("coco", "flickr30k") else 1)
        sample = learned[0]
        assert answer_of(module, sample) == dataset[0]["target"][0]
        assert torch.equal(sample["input_ids"][: len(dataset[0]["input_ids"])], dataset[0]["input_ids"])
        unlabelled = module.unlabelled(split)[0]
        assert unlabelled.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert module.describe()["data"].startswith("stand-in")


@pytest.mark.parametrize("task", ["vizwiz", "docvqa"])
def test_validation_and_test_are_the_two_parts_of_train_test_split(opened, folders, task):
    kind, suffix = ("parquet", "parquet") if task == "vizwiz" else ("json", "jsonl")
    published = load_dataset(kind, data_files=str(folders[1] / task / f"validation.{suffix}"), split="train")
    published = published.map(lambda row, i: {"row": i}, with_indices=True)
    parts = published.train_test_split(test_size=0.8, seed=42)
    module = opened(task)
    for split, theirs in (("val", "train"), ("test", "test")):
        rows, expected = module._rows(module._opened, split).table, parts[theirs]
        name = SPECS[task].columns["id"][0]
        assert rows.column("id") == expected[name]
    assert not set(module._rows(module._opened, "val")._ids) & set(module._rows(module._opened, "test")._ids)


@pytest.mark.parametrize("task", ["vizwiz", "iconqa", "docvqa"])
def test_sizes_of_the_published_splits(task):
    published = {"vizwiz": 4319, "iconqa": 9954, "docvqa": 5349}[task]
    expected = {"vizwiz": (863, 3456), "iconqa": (1990, 7964), "docvqa": (1069, 4280)}[task]
    parts = [SPECS[task].splits[split] for split in ("val", "test")]
    assert tuple(len(part.cut.indices(published)[part.side]) for part in parts) == expected


def test_vizwiz_learns_the_first_of_ten_answers(opened):
    module = opened("vizwiz")
    answers = module.dataset("test")[3]["target"]
    assert len(answers) == 10
    assert answer_of(module, module.supervised("test")[3]) == answers[0]


def test_chartqa_is_scored_by_its_first_label(opened, tmp_path):
    rows = [{"image": png(draw("red")), "query": "How much?", "label": ["7", "8"], "human_or_machine": 0}]
    for split in ("train", "val", "test"):
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    module = opened("chartqa", tmp_path)
    assert module.dataset("test")[0]["target"] == ["7"]
    assert answer_of(module, module.supervised("train")[0]) == "7"


def test_captions_of_a_picture_are_joined_wherever_they_stand(opened, tmp_path):
    def row(image, text):
        sentence = {"raw": text, "imgid": image}
        return {"image": png(draw("red")), "imgid": image, "cocoid": 10 + image, "sentences": sentence}

    rows = [row(5, " one "), row(2, "two"), row(5, "three"), row(2, "four"), row(5, "five")]
    for split in ("train", "validation", "test"):
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    module = opened("coco", tmp_path)
    assert [module.dataset("val")[i]["target"] for i in range(2)] == [["one", "three", "five"], ["two", "four"]]
    learned = module.supervised("train")
    assert [answer_of(module, learned[i]) for i in range(5)] == ["one", "three", "five", "two", "four"]


def test_flickr_is_divided_by_its_column(opened, folders):
    module = opened("flickr30k")
    for split in SPLITS:
        assert all(str(name).startswith(split) for name in module._rows(module._opened, split)._ids)


def test_iconqa_leaves_out_questions_on_several_pictures(opened, tmp_path):
    def row(kind, choices, answer):
        picture = {"query_image": {"bytes": png(draw("red")), "path": None}, "question": "Which?", "choices": choices}
        return {**picture, "answer": answer, "ques_type": kind, "question_id": kind}

    rows = [row("choose_txt", "top,bottom", "bottom"), row("choose_img", "", "0"), row("fill_in_blank", "", "4")] * 5
    data = Dataset.from_list(rows).cast_column("query_image", Image())
    DatasetDict({"val": data}).save_to_disk(str(tmp_path))
    module = opened("iconqa", tmp_path)
    assert [len(module.dataset(split)) for split in ("val", "test")] == [2, 8]
    samples = [module.dataset(split)[i] for split, size in (("val", 2), ("test", 8)) for i in range(size)]
    assert sorted(sample["target"][0] for sample in samples) == ["4"] * 5 + ["bottom"] * 5
    letters = opened("iconqa", tmp_path, prompt_style="lmms_eval")
    assert {letters.dataset("test")[i]["target"][0] for i in range(8)} == {"B", "4"}


@pytest.mark.parametrize("task", ["vizwiz", "flickr30k"])
@pytest.mark.parametrize("modality", ["text", "image", "both"])
def test_modalities_drop_what_they_say(opened, task, modality):
    module = opened(task, modality=modality)
    image = module._encoder.tokenizer.convert_tokens_to_ids("<image>")
    joint = JointDataModule({task: module}, batch_size=1, split="val")
    joint.setup("fit")
    inputs = next(iter(joint.train_dataloader()))[task]
    text = module._encoder.tokenizer.decode(inputs["input_ids"][0])
    assert ("pixel_values" in inputs) == (modality != "text")
    assert int((inputs["input_ids"] == image).sum()) == (0 if modality == "text" else 4)
    words = "Answer the question" if task == "vizwiz" else "Provide a one-sentence caption"
    assert (words in text) == (modality != "image")
    if modality == "image":
        assert text == "<s> USER: <image><image><image><image> \nASSISTANT:"


def test_a_broken_picture_is_named_when_it_is_read(opened, folders, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(draw("red"))[:60])
    rows = [{"image": "images/a.png", "question": "Color?", "answers": ["red"], "question_id": 9}] * 10
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = opened("docvqa", tmp_path)
    with pytest.raises(DataError, match=r"DocVQA: .*validation.*sample 0 \(9\).*a\.png cannot be decoded"):
        module.dataset("val")[0]
    assert "pixel_values" not in opened("docvqa", tmp_path, modality="text").dataset("val")[0]  # nothing is decoded


@pytest.mark.parametrize("answers", [None, [], [None]])
def test_a_question_without_an_answer_is_named(opened, tmp_path, answers):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(draw("red")))
    row = {"image": "images/a.png", "question": "Color?", "answers": answers, "question_id": 9}
    (tmp_path / "validation.jsonl").write_text("\n".join([json.dumps(row)] * 10))
    module = opened("docvqa", tmp_path)
    with pytest.raises(DataError, match=r"sample 0 \(9\): its answers are .*; expected at least one text"):
        module.dataset("val")[0]
    assert module.unlabelled("val")[0]["pixel_values"].shape == (3, 28, 28)  # a merge is learned without answers


def test_what_is_not_there_is_named(folders, opened, tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "a.png", "question": "Color?"}) + "\n")
    module = opened("chartqa", tmp_path)
    with pytest.raises(DataError, match=r"ChartQA: .* has no column 'label' or 'answer'; it has image, question"):
        module.dataset("val")
    with pytest.raises(DatasetNotFoundError, match=r"ChartQA: .* has no split 'test'"):
        module.dataset("test")
    with pytest.raises(ConfigError, match="call setup"):
        VLMDataModule("coco", folders[0], str(folders[1] / "coco")).supervised("train")
    with pytest.raises(ConfigError, match="no vision-language task 'vqav2'"):
        VLMDataModule("vqav2")
    for option, value in (("modality", "audio"), ("image_mode", "stretch"), ("prompt_style", "own")):
        with pytest.raises(ConfigError, match=f"'{value}'"):
            VLMDataModule("coco", **{option: value})


@pytest.mark.parametrize("task", SIZES)
def test_without_network_the_message_names_what_a_folder_must_hold(task, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetNotFoundError, match=r"(?s)cannot be had from the hub.*`source`.*columns image"):
        open_source(SPECS[task])
