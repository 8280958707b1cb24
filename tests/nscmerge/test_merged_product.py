"""The hot path's own autograd node against plain autograd and finite differences."""

import pytest
import torch
from torch import nn

from nscmerge.factors import LowRank
from nscmerge.merged_linear import MergedLinear
from nscmerge.merged_product import merged_product


def tensors(bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"z": (2, 3, 7), "c": (4,), "weight": (5, 7), "bias": (5,), "A": (4, 7), "B": (5, 4)}
    made = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}
    return made if bias else {**made, "bias": None}


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_equal_plain_autograd(bias):
    t = tensors(bias)
    z, c = t["z"].requires_grad_(), t["c"].requires_grad_()
    out = merged_product(**t)
    want = nn.functional.linear(z, t["weight"], t["bias"]) + nn.functional.linear(c * (z @ t["A"].T), t["B"])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got = torch.autograd.grad((out * weights).sum(), (z, c))
    for a, b in zip(got, torch.autograd.grad((want * weights).sum(), (z, c)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences():
    t = tensors(True)
    frozen = (t["weight"], t["bias"], t["A"], t["B"])
    assert torch.autograd.gradcheck(
        lambda z, c: merged_product(z, c, *frozen), (t["z"].requires_grad_(), t["c"].requires_grad_())
    )


def test_frozen_inputs_and_activations_get_no_gradient():
    t = tensors(True)
    c = t["c"].requires_grad_()
    out = merged_product(**t)
    assert out.requires_grad
    out.sum().backward()
    assert c.grad is not None
    assert t["z"].grad is None
    assert t["weight"].grad is None


@pytest.mark.parametrize("ranks", [(2,), (2, 3), (0, 1)])
def test_the_layer_gives_the_same_with_and_without_the_node(ranks):
    """A subclass of nn.Linear (as quantised layers are) multiplies in its own way; both ways must agree."""

    class Own(nn.Linear):
        pass

    generator = torch.Generator().manual_seed(2)
    experts = [
        LowRank(torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator), 1.5) for r in ranks
    ]
    lam = torch.linspace(0.2, 0.7, len(ranks)).requires_grad_()
    z = torch.randn(4, 6, generator=generator, requires_grad=True)
    torch.manual_seed(0)
    plain, own = nn.Linear(6, 5).requires_grad_(False), Own(6, 5).requires_grad_(False)
    own.load_state_dict(plain.state_dict())
    results = []
    for base in (plain, own):
        out = MergedLinear(base, experts, lambda: lam)(z)
        results.append((out, *torch.autograd.grad(out.square().sum(), (z, lam))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_rules_the_products():
    experts = [LowRank(torch.ones(2, 6), torch.ones(5, 2))]
    layer = MergedLinear(nn.Linear(6, 5).requires_grad_(False), experts, lambda: torch.ones(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(3, 6)).dtype == torch.bfloat16
