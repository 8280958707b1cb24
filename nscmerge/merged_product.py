"""W0 z + b + B (c * (A z)) as one autograd node: what the hot path spends its time in.

Plain autograd keeps an intermediate more and adds two full-width tensors in each direction; here the thin products are
accumulated in place by the matrix multiplications themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MergedProduct(torch.autograd.Function):
    """Gradients for z and c alone: weight, bias and factors are frozen."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """Return (..., d_out) for z (..., d_in), c (R,), weight (d_out, d_in), A (R, d_in), B (d_out, R)."""
        flat = z.reshape(-1, z.shape[-1])
        y = flat @ A.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(y * c, B.T)
        ctx.save_for_backward(y, c, weight, A, B)
        return out.view(*z.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for z and c, where they are needed."""
        y, c, weight, A, B = ctx.saved_tensors
        (gradient,) = gradients
        flat = gradient.reshape(-1, gradient.shape[-1])
        u = flat @ B
        for_c = (u * y).sum(0) if ctx.needs_input_grad[1] else None
        for_z = None
        if ctx.needs_input_grad[0]:
            for_z = (flat @ weight).addmm_(u * c, A).view(*gradient.shape[:-1], weight.shape[1])
        return for_z, for_c, None, None, None, None


def merged_product(z: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """Return W0 z + b + B (c * (A z)), differentiable in z and c; all tensors of one dtype. Shapes as above."""
    product: Tensor = MergedProduct.apply(z, c, weight, bias, A, B)
    return product
