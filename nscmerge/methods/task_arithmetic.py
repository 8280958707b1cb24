"""Task arithmetic on low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence

from nscmerge.factors import LowRank
from nscmerge.methods.stacking import weighted_sum


def task_arithmetic(experts: Sequence[LowRank], *, lam: float = 1.0) -> LowRank:
    """Return ``lam * sum_k s_k B_k A_k`` of one layer, exactly, as one pair of rank sum_k r_k.

    The same numbers as PEFT's ``cat``. Half-precision factors give fp32 ones.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k.
        lam: Merge coefficient shared by all tasks, no unit; 0 gives back the base model.

    Raises:
        ShapeError: The experts differ in d_in or d_out. Their ranks may differ.

    Source: Ilharco et al., arXiv:2212.04089.
    """
    return weighted_sum(experts, lam)
