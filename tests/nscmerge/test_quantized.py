"""Bases in 8 and 4 bit: factors beside them stay numbers, and a merge is learned through them. On the CPU."""

import pytest
import torch
from torch import nn

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC
from nscmerge.quantized import factor_dtype
from nscmerge.surgery import replace_module
from tests.fakes.fit_llama import TASKS, adapters, llama
from tests.nscmerge.test_checkpointing import batch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="8- and 4-bit bases need the extra 'quantize'")


def packed(linear, bits, dtype=torch.float32):
    """Return the layer as bitsandbytes holds it."""
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
    weight = linear.weight.detach().clone()
    if bits == 8:
        new = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False)
        new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        new = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=dtype, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return new.to("cpu")


def quantised(bits):
    model = llama()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            replace_module(model.model.layers, name, packed(module, bits))
    return model


@pytest.mark.parametrize(("bits", "stored"), [(8, torch.int8), (4, torch.uint8)])
def test_factors_are_not_stored_as_the_weight_is(bits, stored):
    linear = packed(llama().model.layers[0].self_attn.q_proj, bits)
    assert linear.weight.dtype == stored
    assert factor_dtype(linear) == torch.float32
    assert factor_dtype(nn.Linear(2, 2).bfloat16()) == torch.bfloat16
    assert factor_dtype(packed(nn.Linear(64, 64, bias=False), 4, torch.bfloat16)) == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_the_merged_layer_is_the_quantised_base_plus_the_update(bits):
    model = quantised(bits)
    base = model.model.layers[0].self_attn.q_proj
    own = {t: a.layers for t, a in adapters(model).items()}
    merged = attach(model, own, Coefficients(sorted(own["a"]), TASKS))
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    want = base(x) + sum(0.4 * e[name].scaling * x @ e[name].A.T @ e[name].B.T for e in own.values())
    torch.testing.assert_close(merged.layers[name](x), want, rtol=1e-5, atol=1e-5)
    half = merged.layers[name](x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=5e-2, atol=5e-2)
    assert merged.detach().model.layers[0].self_attn.q_proj is base


@pytest.mark.parametrize("bits", [8, 4])
def test_a_merge_is_learned_through_it(bits):
    """The same losses and gradients as of a plain base with the weights that the quantised ones stand for."""
    eye = torch.eye(48)
    model, plain = quantised(bits), llama()
    for name, module in plain.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            stands_for = model.model.layers.get_submodule(name)(eye[: module.in_features, : module.in_features])
            module.weight = nn.Parameter(stands_for.T.contiguous(), requires_grad=False)
    found = []
    for base in (plain, model):
        own = {t: a.layers for t, a in adapters(base).items()}
        coefficients, objective = Coefficients(sorted(own["a"]), TASKS), NSC(blocks=1)
        objective.prepare(base, own)
        losses = objective.losses(attach(base, own, coefficients), fuse(batch())[0])
        objective.total(list(losses.values())).backward()
        slopes = torch.stack([torch.zeros(3) if lam.grad is None else lam.grad for lam in coefficients.lam])
        found.append((torch.stack(list(losses.values())).detach(), slopes))
    (want, slopes), (got, through) = found
    # 8-bit products also round what goes in.
    close = {"rtol": 0.05, "atol": 2e-3} if bits == 8 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(through, slopes, **close)
    assert slopes.abs().max() > 5e-3
