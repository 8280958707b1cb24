"""Where a base model may come from, and what is said when it is not there."""

import hashlib

import pytest
import torch

from nscmerge.base_model import load_base_model, resolve_source, weights_sha256
from nscmerge.errors import ConfigError, DatasetNotFoundError
from tests.fakes.text_tasks import tiny_bert
from tests.fakes.vit import WIDTH, tiny_vit, write_tiny_vit


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


@pytest.fixture
def vit(tmp_path):
    return write_tiny_vit(tmp_path / "vit")


def test_timm_folder_loads_frozen_split_and_the_same(vit):
    model = load_base_model(f"timm:{vit}")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    names = [name for name, _ in model.blocks[0].attn.named_children()]
    assert "qkv" in names
    assert [name for name, _ in model.blocks[0].attn.qkv.named_children()] == ["q", "k", "v"]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), tiny_vit()(x), rtol=1e-5, atol=1e-5)
    assert model(x).shape == (2, WIDTH)  # no classifier


def test_timm_takes_images_of_other_sizes(vit):
    model, fused = load_base_model(f"timm:{vit}"), tiny_vit()
    x = torch.randn(2, 3, 12, 28, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.forward_features(x), fused.forward_features(x), rtol=1e-5, atol=1e-5)
    assert model.forward_features(x).shape == (2, 1 + 3 * 7, WIDTH)


def test_timm_folder_has_a_hash_and_a_dtype(vit):
    known = hashlib.sha256((vit / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(f"timm:{vit}") == known
    assert weights_sha256("timm:vit_tiny_patch16_224") is None
    load_base_model(f"timm:{vit}", sha256=known)
    with pytest.raises(ConfigError, match=f"SHA-256 {known}, expected 00"):
        load_base_model(f"timm:{vit}", sha256="00")
    assert {p.dtype for p in load_base_model(f"timm:{vit}", "bfloat16").parameters()} == {torch.bfloat16}


def test_timm_sources():
    assert resolve_source("timm:package:tasks/experts/text6").endswith("tasks/experts/text6")
    assert resolve_source("timm:vit_base_patch16_224.augreg_in21k") == "timm:vit_base_patch16_224.augreg_in21k"
    assert resolve_source("timm:hf-hub:someone/vit") == "timm:hf-hub:someone/vit"
    assert resolve_source("timm:./vit") == "./vit"


def test_timm_folders_that_are_not_whole(vit):
    (vit / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        load_base_model(f"timm:{vit}")
    (vit / "config.json").write_text('{"architecture": "vit_tiny_patch16_244", "pretrained_cfg": {}}')
    with pytest.raises(ConfigError, match="vit_tiny_patch16_244"):
        load_base_model(f"timm:{vit}")
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model.safetensors is missing.*other formats are not read"):
        load_base_model(f"timm:{vit}")


def test_timm_weights_that_are_damaged(vit):
    weights = (vit / "model.safetensors").read_bytes()
    (vit / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base_model(f"timm:{vit}")


def test_timm_names_that_are_unknown_or_no_transformer():
    with pytest.raises(ConfigError, match=r"cannot be loaded.*did you mean 'vit_base_patch16_224"):
        load_base_model("timm:vit_base_patch16_242")
    with pytest.raises(ConfigError, match=r"does not take images of any size.*Name a plain vision transformer"):
        load_base_model("timm:resnet18.a1_in1k")


def test_drop_path_is_for_timm_and_acts_in_training_mode_only(vit):
    from timm.layers import DropPath

    model = load_base_model(f"timm:{vit}", drop_path=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), tiny_vit()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"drop_path is 0.3; only base models of timm"):
        load_base_model(tiny_bert(), drop_path=0.3)
