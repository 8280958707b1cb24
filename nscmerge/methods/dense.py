"""Rules for whole tensors beside LoRA (a projector's weight and bias): what a method does with deltas D_k."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def dense_sum(deltas: Sequence[Tensor], *, lam: float = 1.0) -> Tensor:
    """Return ``lam * sum_k D_k`` in fp32 at least; ``deltas``: K tensors of one shape, zeros for tasks without it."""
    dtype = reduce(torch.promote_types, (d.dtype for d in deltas), torch.float32)
    return lam * torch.stack([d.to(dtype) for d in deltas]).sum(0)


def dense_mean(deltas: Sequence[Tensor], *, lam: float = 1.0) -> Tensor:
    """Return ``lam * mean_k D_k`` in fp32 at least; ``deltas``: K tensors of one shape, zeros for tasks without it."""
    return dense_sum(deltas, lam=lam) / len(deltas)
