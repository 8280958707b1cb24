"""IconQA's archive, from its folders to samples."""

import json

import pytest
from datasets import disable_progress_bars

from datamodules.iconqa_archive import convert, main
from datamodules.twins.models import write_llava
from datamodules.twins.pictures import draw
from datamodules.vlm import VLMDataModule
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError, OutputExistsError


def ask(root, split, kind, number, **content):
    folder = root / "iconqa_data" / "iconqa" / split / kind / str(number)
    folder.mkdir(parents=True)
    (folder / "data.json").write_text(json.dumps({"question": f"Question {number}?", "ques_type": kind, **content}))
    draw("red").save(folder / "image.png")


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "archive"
    for split in ("train", "val"):
        for i in range(5):
            ask(root, split, "choose_txt", 10 * i, choices=["top", "bottom"], answer=i % 2)
            ask(root, split, "fill_in_blank", 10 * i + 1, answer=str(i))
            ask(root, split, "choose_img", 10 * i + 2, choices=["a.png", "b.png"], answer=0)
    return root


def test_from_the_archive_to_samples(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()
    main([str(archive), "--output", str(tmp_path / "iconqa")])
    assert "10 train, 10 val" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "iconqa" / "val.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["0", "1", "10", "11", "20", "21", "30", "31", "40", "41"]
    assert [row["answer"] for row in rows] == ["top", "0", "bottom", "1", "top", "2", "bottom", "3", "top", "4"]
    module = VLMDataModule("iconqa", str(write_llava(tmp_path / "base")), str(tmp_path / "iconqa"))
    module.setup()
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [10, 2, 8]
    sample = module.dataset("train")[2]
    text = module._encoder.tokenizer.decode(sample["input_ids"])
    assert text.endswith("Question 10?\nChoices: top, bottom\nAnswer the question using a single word. ASSISTANT:")
    assert sample["target"] == ["bottom"]
    assert "Choices" not in module._encoder.tokenizer.decode(module.dataset("train")[1]["input_ids"])


def test_what_is_wrong_is_named(archive, tmp_path):
    with pytest.raises(
        DatasetNotFoundError, match="is not the unpacked archive; expected the folders train/choose_txt"
    ):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="inside of each other"):
        convert(archive, archive / "out")
    convert(archive, tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"train\.jsonl is there already"):
        convert(archive, tmp_path / "out")
    ask(archive, "val", "choose_txt", 99, choices=["top"], answer=3)
    with pytest.raises(DataError, match=r"99.data\.json has no question with an answer: IndexError"):
        convert(archive, tmp_path / "other")
