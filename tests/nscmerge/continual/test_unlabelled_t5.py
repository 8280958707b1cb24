"""AdaMerging and LoRA-WEMoE on an encoder-decoder of transformers, answers as logits of a first token; and on disk."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.folder import append_to, load_state, start_folder
from nscmerge.update import load_update

LR = 1e-2


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config)


class Answers(nn.Module):
    outputs = "tokens"

    def forward(self, model, inputs):
        return model(**inputs).logits


def expert(model, seed):
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(
            torch.randn(2, m.in_features, generator=g) / 4, torch.randn(m.out_features, 2, generator=g) / 4, 2.0
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    return Adapter(layers, "base", name=f"t{seed}")


def inputs(seed, padding=0):
    """Questions of six tokens, the second one of four."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (2, 6), generator=g)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    more = torch.zeros(2, padding, dtype=torch.long)
    return {"input_ids": torch.cat([ids * mask, more], 1), "attention_mask": torch.cat([mask, more], 1)}


def objects(model, padding=0):
    tasks = ("t0", "t1")
    batches = {task: [inputs(10 * k + i, padding) for i in range(2)] for k, task in enumerate(tasks)}
    return {"model": model, "batches": batches, "tasks": {task: Answers() for task in tasks}}


def merge(model, method, padding=0):
    made = continual.make(method, lr=LR, steps=10, **objects(model, padding))
    return made.append(made.start(expert(model, 0)), expert(model, 1))


@pytest.mark.parametrize("method", ["adamerging", "lora_wemoe"])
def test_learns_and_padding_makes_no_difference(model, method):
    state, padded = merge(model, method), merge(model, method, padding=3)
    assert all(line["entropy_after"] < line["entropy_before"] - 1e-3 for line in state.absorbed[-1].log.values())
    made = continual.make(method, **state.options)
    a, b = made.update(state), made.update(padded)
    for name in state.shapes:
        torch.testing.assert_close(a.delta(name), b.delta(name), rtol=1e-3, atol=1e-4)


def test_one_token_attends_to_itself_whatever_its_query(model):
    log = merge(model, "adamerging").absorbed[-1].log
    missed = {name for name, line in log.items() if not line["reached"]}
    assert missed == {f"decoder.block.{i}.layer.0.SelfAttention.{x}" for i in range(2) for x in "qk"}


def test_every_mlp_of_encoder_and_decoder_has_a_gate(model):
    gates = {key.split("|")[1] for key in merge(model, "lora_wemoe").tensors if key.startswith("gate")}
    ends = {"encoder": "layer.1", "decoder": "layer.2"}
    assert gates == {f"{part}.block.{i}.{end}.DenseReluDense.wi_0" for part, end in ends.items() for i in range(2)}


@pytest.mark.parametrize("method", ["adamerging", "lora_wemoe"])
def test_a_folder_grows_to_the_same_merge(model, method, tmp_path):
    whole = merge(model, method)
    folder = tmp_path / "grows"
    start_folder(folder, continual.make(method, lr=LR, steps=10, **objects(model)), expert(model, 0))
    append_to(folder, expert(model, 1), **objects(model))
    grown = load_state(folder)
    made = continual.make(method, **grown.options)
    assert grown.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(grown.tensors[key], whole.tensors[key]) for key in whole.tensors)
    a, b = made.update(grown), made.update(whole)
    assert all(torch.equal(a.delta(name), b.delta(name)) for name in whole.shapes)
    # What lies in the folder is a merge as any other.
    read = load_update(folder)
    task = None if method == "adamerging" else "t1"
    assert all(torch.equal(read.delta(name, task), b.delta(name, task)) for name in whole.shapes)
