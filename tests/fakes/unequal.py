"""Adapters in memory of unequal ranks and scalings, with tensors beside LoRA, and a layer that one task lacks."""

import torch

from nscmerge import Adapter, LowRank

SHAPES = {"blocks.10.o": (7, 9), "blocks.2.q": (8, 5), "blocks.2.v": (6, 6)}
RANKS = [(2,), (2, 2), (1, 4, 3), (2, 3, 1, 2)]  # one task, equal ranks, unequal ones


def adapter(name, rank, seed, scale=1.0):
    """Return a task's adapter; task "b" lacks a layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: LowRank(
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
            scale * (0.5 + seed),
        )
        for layer, (d_out, d_in) in SHAPES.items()
        if (name, layer) != ("b", "blocks.2.v")
    }
    dense = {"blocks.3.bias": torch.randn(5, generator=generator), "p.weight": torch.randn(3, 4, generator=generator)}
    return Adapter(layers, dense={n: scale * t for n, t in dense.items()}, name=name)


def adapters(*ranks, **options):
    return [adapter("abcd"[k], rank, k, **options) for k, rank in enumerate(ranks)]


def tensors(adapter):
    """Every delta of one task by name, zeros where it lacks the layer."""
    layers = {n: adapter.layers[n].dense() if n in adapter.layers else torch.zeros(s) for n, s in SHAPES.items()}
    return layers | dict(adapter.dense)


def masks(experts, drop, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        e.name: {n: torch.rand(t.shape, generator=generator) >= drop for n, t in tensors(e).items()} for e in experts
    }


def agrees(update, expected, lam=1.0):
    """Assert that a merge is ``lam`` times the expected tensors, all of them and no other."""
    assert set(expected) == {*update.layers, *update.dense}
    for name, tensor in expected.items():
        torch.testing.assert_close(update.delta(name), lam * tensor, rtol=2e-6, atol=1e-7)
