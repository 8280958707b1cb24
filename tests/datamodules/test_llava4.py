"""Four tasks of MM-MergeBench: instruction files, prompts, pictures, references."""

import json
import shutil

import pytest
import torch
from datasets import disable_progress_bars
from PIL import Image

from datamodules.base import IGNORED
from datamodules.llava4 import LLaVA4DataModule
from datamodules.twins.llava4 import write_llava4
from datamodules.twins.models import write_llava
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

SYSTEM = (
    "<s> A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
TASKS = ("iconqa", "imagenet", "scienceqa", "vizwiz_caption")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava4")
    disable_progress_bars()
    return str(write_llava(root / "base")), write_llava4(root / "data", rows=10)["iconqa"].parent


def opened(folders, task, source=None, **options):
    module = LLaVA4DataModule(task, str(source or folders[1] / task), folders[0], **options)
    module.setup()
    return module


def text_of(module, ids):
    return module._encoder.tokenizer.decode(ids)


@pytest.mark.parametrize("task", TASKS)
def test_samples_of_every_task(folders, task):
    module = opened(folders, task)
    for split, size in (("train", 18), ("val", 2), ("test", 10)):
        dataset = module.dataset(split)
        assert len(dataset) == size
        captions = 5 if task == "vizwiz_caption" and split == "test" else 1
        for sample in (dataset[i] for i in range(size)):
            assert len(sample["target"]) == captions
            text = text_of(module, sample["input_ids"])
            assert text.startswith(SYSTEM + "<image><image><image><image> \n")
            assert text.endswith(" ASSISTANT:")
        learned = module.supervised(split)
        assert len(learned) == size * captions
        target = learned[0]["target"]
        assert text_of(module, target[target != IGNORED]).strip() == dataset[0]["target"][0] + "</s>"
        assert module.unlabelled(split)[0].keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert module.describe()["data"].startswith("stand-in")


def test_imagenet_asks_with_all_names(folders):
    module = opened(folders, "imagenet")
    text = text_of(module, module.dataset("test")[0]["input_ids"])
    assert "What is the object in the image?\nChoose an answer from the choices below: Doormat, Pomeranian" in text
    assert text.endswith("Lemon, Bernese mountain dog. ASSISTANT:")


def test_pictures_are_padded_or_cut_as_the_task_has_it(folders, tmp_path):
    for task in TASKS:
        module = opened(folders, task)
        assert module.image_mode == ("pad" if task in ("iconqa", "vizwiz_caption") else "center_crop")
    shutil.copytree(folders[1] / "iconqa", tmp_path / "iconqa")
    Image.new("RGB", (90, 30), "white").save(tmp_path / "iconqa" / "images" / "test_0.png")
    padded = opened(folders, "iconqa", tmp_path / "iconqa").dataset("test")[0]["pixel_values"]
    cut = opened(folders, "iconqa", tmp_path / "iconqa", image_mode="center_crop").dataset("test")[0]["pixel_values"]
    assert float(cut.std(dim=(1, 2)).max()) < 1e-6  # all white
    assert float(padded[:, 0].abs().max()) < 0.02  # the mean colour above and below is zero
    torch.testing.assert_close(padded[:, 14, 14], cut[:, 14, 14], rtol=0, atol=0.05)


def test_references_belong_to_the_records_in_order_counted_from_one(folders):
    module = opened(folders, "vizwiz_caption")
    raw = json.loads((folders[1] / "vizwiz_caption" / "val_coco_type.json").read_text())["annotations"]
    for i in range(10):
        assert module.dataset("test")[i]["target"] == [a["caption"] for a in raw if a["image_id"] == i + 1]


def test_validation_from_the_evaluation_file_leaves_it(folders, tmp_path):
    shutil.copytree(folders[1] / "scienceqa", tmp_path / "scienceqa")
    (tmp_path / "scienceqa" / "train.json").unlink()
    module = opened(folders, "scienceqa", tmp_path / "scienceqa", val_from="test", val_fraction=0.2)
    names = [{record.name for record in module._split(split)} for split in ("val", "test")]
    assert [len(part) for part in names] == [2, 8]
    assert not names[0] & names[1]
    with pytest.raises(DatasetNotFoundError, match=r"scienceqa: .* has neither train\.json nor ScienceQA/train\.json"):
        opened(folders, "scienceqa", tmp_path / "scienceqa").dataset("val")


def test_the_folder_of_all_instructions_with_pictures_elsewhere(folders, tmp_path):
    shutil.copytree(folders[1] / "iconqa", tmp_path / "instructions" / "IconQA")
    shutil.move(tmp_path / "instructions" / "IconQA" / "images", tmp_path / "pictures" / "images")
    module = opened(folders, "iconqa", tmp_path / "instructions", images=str(tmp_path / "pictures"))
    assert module.dataset("test")[0]["pixel_values"].shape == (3, 28, 28)
    with pytest.raises(DatasetNotFoundError, match=r"record 0 \(test_0\): its image .*test_0\.png is missing"):
        opened(folders, "iconqa", tmp_path / "instructions").dataset("test")[0]


def test_a_question_without_a_picture(folders, tmp_path):
    record = {"question_id": 1, "text": "<image>\nWhich?\nA. x\nB. y", "answer": 1}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    sample = opened(folders, "scienceqa", tmp_path).dataset("test")[0]
    assert sample.keys() == {"input_ids", "attention_mask", "target"}
    assert sample["target"] == ["B"]
    module = opened(folders, "scienceqa", tmp_path)
    assert text_of(module, sample["input_ids"]) == SYSTEM + "Which?\nA. x\nB. y ASSISTANT:"
    with pytest.raises(ConfigError, match=r"record 0 \(1\): a prompt without a picture and without text"):
        opened(folders, "scienceqa", tmp_path, modality="image").dataset("test")[0]


@pytest.mark.parametrize(("modality", "pictures"), [("text", 0), ("image", 4)])
def test_modalities(folders, modality, pictures):
    module = opened(folders, "iconqa", modality=modality)
    sample = module.unlabelled("val")[0]
    text = text_of(module, sample["input_ids"])
    assert text.count("<image>") == pictures
    assert ("pixel_values" in sample) == (pictures > 0)
    assert ("What color" in text) == (modality == "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is no JSON"),
        ("[]", "expected a JSON list of records, at least one"),
        ('{"a": 1}', "expected a JSON list of records"),
        ("[3]", "record 0: expected an object, got int"),
        ('[{"question_id": 4, "answer": "x"}]', r"record 0 \(4\): its text is None"),
        ('[{"text": "Q?"}]', "record 0: its answer is None"),
        ('[{"conversations": [{"from": "human", "value": "Q?"}]}]', "record 0: its conversation is not one turn"),
    ],
)
def test_broken_instructions_are_named(folders, tmp_path, content, message):
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(DataError, match=message):
        opened(folders, "iconqa", tmp_path).dataset("test")


def test_broken_references_are_named(folders, tmp_path):
    shutil.copytree(folders[1] / "vizwiz_caption", tmp_path / "c")
    file = tmp_path / "c" / "val_coco_type.json"
    file.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "one"}]}))
    with pytest.raises(DataError, match=r"record 1 \(test_1\): .* has no caption for the picture 2"):
        opened(folders, "vizwiz_caption", tmp_path / "c").dataset("test")
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(DataError, match="expected COCO captions"):
        opened(folders, "vizwiz_caption", tmp_path / "c").dataset("test")
    file.unlink()
    with pytest.raises(DatasetNotFoundError, match="it has the references"):
        opened(folders, "vizwiz_caption", tmp_path / "c").dataset("test")


def test_bad_options_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="no task 'ocrvqa' of MM-MergeBench"):
        LLaVA4DataModule("ocrvqa", "x")
    with pytest.raises(ConfigError, match="val_from is 'val'"):
        LLaVA4DataModule("iconqa", "x", val_from="val")
    with pytest.raises(DatasetNotFoundError, match="is no folder"):
        opened(folders, "iconqa", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="call setup"):
        LLaVA4DataModule("iconqa", str(folders[1] / "iconqa"), folders[0]).dataset("test")
