"""easy-VQA where its package is installed."""

import json

import pytest

from datamodules.base import IGNORED
from datamodules.easy_vqa import EasyVQADataModule
from datamodules.twins.models import write_llava
from nscmerge.base_model import package_folder
from nscmerge.errors import ConfigError, DatasetNotFoundError

installed = pytest.mark.skipif(package_folder("easy_vqa") is None, reason="the package easy-vqa is not installed")
ANSWERS = {
    "shape": {"circle", "rectangle", "triangle"},
    "color": {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"},
    "yes_no": {"yes", "no"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_llava(tmp_path_factory.mktemp("llava")))


@installed
@pytest.mark.parametrize(
    ("kind", "sizes"), [("shape", (5002, 1257)), ("color", (5166, 1280)), ("yes_no", (28407, 7136))]
)
def test_every_kind_of_question(base, kind, sizes):
    module = EasyVQADataModule(kind, base, train_size=None, val_size=None, test_size=None)
    module.setup()
    train, val, test = (module._splits[split].questions for split in ("train", "val", "test"))
    assert (len(train) + len(val), len(test)) == sizes
    assert len({q[2] for q in val} | {q[2] for q in train}) <= 4000
    assert not {q[2] for q in val} & {q[2] for q in train}
    assert {q[1] for q in train} == {q[1] for q in test} == ANSWERS[kind]
    sample, learned = module.dataset("val")[0], module.supervised("val")[0]
    assert sample["target"] == [val[0][1]]
    assert sample["pixel_values"].shape == (3, 28, 28)
    tokenizer = module._encoder.tokenizer
    assert tokenizer.decode(sample["input_ids"]) == f"<s> USER: {'<image>' * 4} \n{val[0][0]} ASSISTANT:"
    assert tokenizer.decode(learned["target"][learned["target"] != IGNORED], skip_special_tokens=True) == val[0][1]


@installed
def test_sizes_modality_and_record(base):
    module = EasyVQADataModule("shape", base, train_size=9, val_size=5, test_size=7, modality="text")
    module.setup()
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [9, 5, 7]
    assert "pixel_values" not in module.unlabelled("val")[0]
    assert "rendered" in json.dumps(module.describe())


def test_what_is_wrong_is_named(base, monkeypatch):
    with pytest.raises(ConfigError, match="no questions of the kind 'size'"):
        EasyVQADataModule("size", base)
    with pytest.raises(ConfigError, match="call setup"):
        EasyVQADataModule("shape", base).dataset("test")
    monkeypatch.setattr("datamodules.packages.package_folder", lambda name: None)
    with pytest.raises(DatasetNotFoundError, match="easy-vqa==1"):
        EasyVQADataModule("shape", base).setup()
