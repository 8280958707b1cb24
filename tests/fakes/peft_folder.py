"""Tiny models and their PEFT adapters, written to disk by PEFT itself."""

import copy
import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

QV = ["q_proj", "v_proj"]
IDS = torch.arange(12).reshape(2, 6) + 3
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # the usual 0.02 makes logits too small to see a difference in
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.3)
    )


def expert(folder, base, seed=0, **options):
    """Write an adapter of ``base`` with random factors, as PEFT itself writes it."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def rewrite(folder, change=lambda tensors: tensors, **config):
    """Change tensors and config of an adapter folder in place."""
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    old = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(old | config))


def shard(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: t for k, t in tensors.items() if weight_map[k] == name}, folder / name)
    (folder / "adapter_model.safetensors").unlink()
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
