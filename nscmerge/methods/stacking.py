"""Factors of several tasks side by side: the exact weighted sum of their updates, as one pair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

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
