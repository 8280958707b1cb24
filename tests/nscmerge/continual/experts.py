"""Random experts of one small model, as adapters and as full checkpoints, and what a method makes of them."""

import torch

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense

#: Methods that see neither data nor a model.
METHODS = [name for name in continual.METHODS if name not in ("adamerging", "lora_wemoe")]
#: NUFILT's papercode is undefined on adapters.
UNDEFINED = ("nufilt", "papercode")
CASES = [(m, v) for m in METHODS for v in continual.METHODS[m].VARIANTS if (m, v) != UNDEFINED]
SHAPES = {"blocks.10.o": (14, 9), "blocks.2.q": (8, 12), "head": (10, 10)}
SMALL = {"nufilt": {"filter_rank": 4, "adapter_rank": 3, "task_rank": 2}, "wudi": {"lr": 1e-3}}
ORDER_FREE = ("weight_average", "task_arithmetic", "magmax")
FACTORS = ("weight_average", "task_arithmetic", "knots_ties", "iso_c", "tsv_m", "opcm", "nufilt")


def options(method, **more):
    return SMALL.get(method, {}) | more


def adapter(seed, rank=2, dtype=torch.float64, names=tuple(SHAPES)):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        A, B = torch.randn(rank, d_in, generator=g).to(dtype), torch.randn(d_out, rank, generator=g).to(dtype)
        if name in names:
            layers[name] = LowRank(A, B, 0.5 + seed)
    return Adapter(layers, "base", name=f"task {seed}")


def adapters(ranks=(2, 3, 1), dtype=torch.float64):
    return [adapter(seed, rank, dtype) for seed, rank in enumerate(ranks)]


def checkpoint(expert):
    """The same update as dense deltas of a full checkpoint."""
    tensors = {f"{name}.weight": layer.dense() for name, layer in expert.layers.items()}
    return Adapter(dense=tensors, base_model="base", linear=list(expert.layers), name=expert.name)


def merged(states, dtype=torch.float64):
    return [{name: dense(state.weight(name)).to(dtype) for name in state.shapes} for state in states]


def last(experts, method, variant="default", **more):
    return merged(continual.steps(experts, method, variant, **options(method, **more)))[-1]


def close(a, b, tol=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol * float(b[name].abs().max()))


def matrix(d_out, d_in, seed, rank=None, decay=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    if rank is None and not decay:
        return x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = torch.arange(1, len(s) + 1, dtype=torch.float64) ** -decay
    rank = rank or len(s)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def layer(d_out, d_in, rank, seed):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank)))
    return LowRank(A, B, 0.4)


def expert(seed, rank=3):
    return Adapter({"a": layer(12, 9, rank, 10 * seed), "b": layer(8, 14, rank, 10 * seed + 1)}, name=f"e{seed}")
