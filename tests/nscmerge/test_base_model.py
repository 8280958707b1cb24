"""Where a base model may come from, and what is said when it is not there."""

import hashlib

import pytest
import torch

from nscmerge.base_model import load_base_model, resolve_source, weights_sha256
from nscmerge.errors import ConfigError, DatasetNotFoundError
from tests.fakes.text_tasks import tiny_bert


@pytest.fixture
def folder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_loads_frozen_and_in_eval_mode(folder):
    model = load_base_model(str(folder))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in load_base_model(str(folder), "bfloat16").parameters()} == {torch.bfloat16}


def test_hash_is_that_of_the_weight_file(folder):
    known = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(str(folder)) == known
    load_base_model(str(folder), sha256=known)
    with pytest.raises(ConfigError, match=f"SHA-256 {known}, expected 00"):
        load_base_model(str(folder), sha256="00")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_bert().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base_model(str(folder))


def test_package_sources():
    assert resolve_source("package:tasks/experts/text6").endswith("tasks/experts/text6")
    assert resolve_source("some/hub-id") == "some/hub-id"
    with pytest.raises(DatasetNotFoundError, match=r"'no_such_package' is not installed.*pip install"):
        resolve_source("package:no_such_package/model")
    with pytest.raises(DatasetNotFoundError, match="'tasks' is installed but has no folder 'nothing'"):
        resolve_source("package:tasks/nothing")


def test_unknown_dtype():
    with pytest.raises(ConfigError, match="dtype 'float33'"):
        load_base_model(tiny_bert(), "float33")
