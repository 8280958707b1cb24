"""PEFT's ``linear`` combination: factors are added, not products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nscmerge.errors import MethodError, ShapeError
from nscmerge.factors import LowRank, check_same_layer
from nscmerge.methods.stacking import working_dtype


def linear(experts: Sequence[LowRank], *, lam: float = 1.0) -> LowRank:
    """Return ``lam * (sum_k sqrt(s_k) B_k) (sum_k sqrt(s_k) A_k)`` of one layer, of the common rank.

    The product holds the cross terms B_j A_k, so the merge depends on which of many equal factorisations was trained.
    Half-precision factors give fp32 ones.

    Args:
        experts: One layer of K adapters of the same rank: A (r, d_in), B (d_out, r), scaling s_k >= 0.
        lam: Merge coefficient, no unit; it multiplies the product once.

    Raises:
        ShapeError: The experts differ in d_in, d_out or rank.
        MethodError: A scaling is negative, so that it has no square root.

    Source: PEFT, LoraModel.add_weighted_adapter(combination_type="linear"), all weights 1.
    """
    check_same_layer(experts)
    if len(set(ranks := [e.rank for e in experts])) > 1:
        raise ShapeError(f"linear adds factors of one rank, got ranks {ranks}; use task_arithmetic or svd instead.")
    if negative := [f"{e.scaling:g} of expert {k}" for k, e in enumerate(experts) if e.scaling < 0]:
        raise MethodError(
            f"linear needs scaling >= 0, got {', '.join(negative)}; negate that adapter's B and its alpha, or use "
            "task_arithmetic."
        )
    dtype = working_dtype(experts)
    roots = [math.sqrt(e.scaling) for e in experts]
    A = torch.stack([root * e.A.to(dtype) for root, e in zip(roots, experts, strict=True)]).sum(0)
    B = torch.stack([root * e.B.to(dtype) for root, e in zip(roots, experts, strict=True)]).sum(0)
    return LowRank(A, lam * B)
