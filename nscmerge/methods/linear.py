"""PEFT's ``linear`` combination: factors are added, not products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nscmerge.factors import LowRank, check_same_layer
from nscmerge.methods.stacking import check_equal_ranks, rooted, working_dtype


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
    check_equal_ranks(experts, "linear")
    factors = rooted(experts, "linear", working_dtype(experts))
    A = torch.stack([A for A, _ in factors]).sum(0)
    B = torch.stack([B for _, B in factors]).sum(0)
    return LowRank(A, lam * B)
