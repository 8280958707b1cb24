"""Adapter folders in PEFT's layout, written without PEFT or a model: any tensors, any config, any fault."""

import json

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
LAYERS = [f"model.layers.{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "v_proj")]


def factors(seed=0, layers=LAYERS, rank=4, d_in=24, d_out=20, dtype=torch.float32):
    """Random factors of every layer, by key."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = A.to(dtype)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = B.to(dtype)
    return tensors


def write(folder, tensors, **config):
    """Write a folder from its tensors; the rank in the config is that of the first factor unless given."""
    folder.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    rank = next((len(t) for k, t in sorted(tensors.items()) if "lora_A" in k), 4)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def change(folder, edit=lambda tensors: tensors, **config):
    """Edit tensors and config of a folder in place."""
    tensors = {k: t.contiguous() for k, t in edit(load_file(folder / "adapter_model.safetensors")).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    old = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(old | config))


def edit(key, new):
    """Change the tensors whose key ends so."""
    return lambda folder: change(folder, lambda t: {k: new(v) if k.endswith(key) else v for k, v in t.items()})


def drop(key):
    return lambda folder: change(folder, lambda t: {k: v for k, v in t.items() if not k.endswith(key)})


def add(key, tensor, **config):
    return lambda folder: change(folder, lambda t: t | {PREFIX + key: tensor}, **config)
