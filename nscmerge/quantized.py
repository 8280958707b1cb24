"""Linear layers whose weights are stored in 8 or 4 bit: what the factors beside them are held in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def factor_dtype(linear: nn.Linear) -> torch.dtype:
    """Return the dtype for factors and deltas that run beside a layer: its weight's, unless that is quantised.

    A quantised weight (int8, packed uint8, fp8) says how it is stored, not what it computes in: its layer may name a
    ``compute_dtype``, as 4-bit layers of bitsandbytes do; else fp32, which the product casts to its input's dtype.
    """
    stored = linear.weight.dtype
    if stored.is_floating_point and stored.itemsize > 1:
        return stored
    computes = getattr(linear, "compute_dtype", None)
    return computes if isinstance(computes, torch.dtype) else torch.float32


def factor_like(linear: nn.Linear) -> Tensor:
    """Return an empty tensor of :func:`factor_dtype` on the layer's device, as an argument of ``Tensor.to``."""
    return torch.empty(0, dtype=factor_dtype(linear), device=linear.weight.device)
