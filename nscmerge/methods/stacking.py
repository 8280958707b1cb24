"""Factors of several tasks side by side: the exact weighted sum of their updates, as one pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from nscmerge.errors import MethodError, ShapeError
from nscmerge.factors import LowRank, check_same_layer


def working_dtype(experts: Sequence[LowRank]) -> torch.dtype:
    """Return the dtype that methods compute in and return: the widest of all factors, fp32 at least."""
    return reduce(torch.promote_types, (t.dtype for e in experts for t in (e.A, e.B)), torch.float32)


def weighted_sum(experts: Sequence[LowRank], weight: float) -> LowRank:
    """Return ``weight * sum_k s_k B_k A_k`` exactly, as one pair of rank R = sum_k r_k with scaling 1.

    The weight and s_k go into B alone, so that A keeps the row space that null-space geometry reads.

    Raises:
        ShapeError: No expert, or d_in or d_out differ. Ranks may differ.
    """
    check_same_layer(experts)
    dtype = working_dtype(experts)
    A = torch.cat([e.A.to(dtype) for e in experts])
    B = torch.cat([weight * e.scaling * e.B.to(dtype) for e in experts], dim=1)
    return LowRank(A, B)


def rooted(experts: Sequence[LowRank], method: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return ``(sqrt(s_k) A_k, sqrt(s_k) B_k)`` of every task: what methods that mix factors start from.

    Raises:
        MethodError: A scaling is negative, so that it has no square root.
    """
    if negative := [f"{e.scaling:g} of expert {k}" for k, e in enumerate(experts) if e.scaling < 0]:
        raise MethodError(
            f"{method} needs scaling >= 0, got {', '.join(negative)}; negate that adapter's B and its alpha, or use "
            "task_arithmetic."
        )
    roots = [math.sqrt(e.scaling) for e in experts]
    return [(root * e.A.to(dtype), root * e.B.to(dtype)) for root, e in zip(roots, experts, strict=True)]


def check_equal_ranks(experts: Sequence[LowRank], method: str) -> None:
    """Raise unless all experts have one rank.

    Raises:
        ShapeError: They have several.
    """
    if len(set(ranks := [e.rank for e in experts])) > 1:
        raise ShapeError(f"{method} adds factors of one rank, got ranks {ranks}; use task_arithmetic or svd instead.")
