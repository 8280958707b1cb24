"""What is not plain LoRA, incomplete or damaged is refused, with adapter, layer or file and the way out."""

import json

import pytest
import torch

from nscmerge import load_adapter
from tests.fakes.peft_folder import QV, expert, llama, rewrite, shard


def without(*ends):
    return lambda tensors: {k: t for k, t in tensors.items() if not k.endswith(ends)}


def replaced(end, new):
    return lambda tensors: {k: new(t).contiguous() if k.endswith(end) else t for k, t in tensors.items()}


def extra(name, tensor):
    return lambda tensors: tensors | {f"base_model.model.{name}": tensor}


Q0 = "layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "dora": ({"use_dora": True}, None, "use_dora is set, that is DoRA"),
    "dora_key": ({}, extra("m.lora_magnitude_vector", torch.ones(2)), "belongs to DoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'.*converts"),
    "olora": ({"init_lora_weights": "olora"}, None, "init_lora_weights is 'olora'"),
    "lora_bias": ({"lora_bias": True}, None, "lora_bias, a bias beside B"),
    "lora_bias_key": ({}, extra("m.lora_B.bias", torch.ones(2)), "bias beside B"),
    "other_type": ({"peft_type": "IA3"}, None, "peft_type in adapter_config.json is 'IA3'; expected 'LORA'"),
    "rank": ({"r": 5}, None, "layers.0.self_attn.q_proj': the config says rank 5.*the tensors have rank 3"),
    "bad_rank": ({"r": "x"}, None, "gives rank 'x'"),
    "bad_alpha": ({"lora_alpha": None}, None, "gives alpha None"),
    "bad_pattern": ({"rank_pattern": {"(": 3}}, None, "not a regular expression"),
    "unknown_key": ({}, extra("model.norm.weight", torch.ones(2)), "unknown key 'base_model.model.model.norm.weight'"),
    "adapter_name": ({}, extra("m.lora_A.default.weight", torch.ones(2, 2)), "unknown LoRA key.*without an adapter"),
    "partner": ({}, without(Q0), "layers.0.self_attn.q_proj': lora_A is missing"),
    "shapes": ({}, replaced(Q0, lambda t: t[:2]), r"A is \(2, 32\) and B \(32, 3\); their ranks differ"),
    "flat": ({}, replaced(Q0, lambda t: t.flatten()), r"A is \(96,\).*two filled matrices.*gathering"),
    "nan": ({}, replaced(Q0, lambda t: t * float("nan")), r"q_proj': lora_A.weight holds 96 NaN or Inf of 96 values"),
    "dtype": ({}, replaced(Q0, lambda t: t.to(torch.int32)), "is torch.int32; expected fp16"),
    "zero": ({}, replaced("lora_B.weight", torch.zeros_like), "all 4 layers are zero updates"),
    "no_lora": ({"bias": "all"}, lambda _: {"base_model.model.x.bias": torch.ones(2)}, "no LoRA tensor in it"),
    "no_prefix": ({}, lambda t: {k[11:]: v for k, v in t.items()}, "unknown key 'model.model.layers.0.*start with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, case):
    config, change, message = BAD[case]
    expert(tmp_path / "mine", llama(), r=3, target_modules=QV)
    rewrite(tmp_path / "mine", change or (lambda tensors: tensors), **config)
    with pytest.raises(ValueError, match=f"(?s)adapter 'mine'.*{message}"):
        load_adapter(tmp_path / "mine")


def test_missing_or_foreign_files_are_named(tmp_path, monkeypatch):
    folder = expert(tmp_path / "mine", llama(), r=3, target_modules=QV)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_adapter(folder)
    weights.write_bytes(whole)
    index = shard(folder)
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 'adapter_model-00002-of-00002.safetensors', which is not in"):
        load_adapter(folder)
    index.write_text(json.dumps({"weight_map": {"k": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '../outside.safetensors'"):
        load_adapter(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        load_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle.*nscmerge convert"):
        load_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        load_adapter(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for missing in ("owner/there-is-none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"neither a folder on this machine nor a hub id"):
            load_adapter(missing)
