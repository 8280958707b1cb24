"""Plain averaging of the experts' weights, on low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence

from nscmerge.errors import ShapeError
from nscmerge.factors import LowRank
from nscmerge.methods.stacking import weighted_sum


def weight_average(experts: Sequence[LowRank], *, lam: float = 1.0) -> LowRank:
    """Return ``lam / K * sum_k s_k B_k A_k`` of one layer, exactly: the mean of K expert models.

    A task without this layer counts as a zero update: its expert holds the base weight there. Half-precision factors
    give fp32 ones.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k.
        lam: Coefficient on the mean update, no unit; 1 is the mean of the expert models.

    Raises:
        ShapeError: No expert, or the experts differ in d_in or d_out. Their ranks may differ.

    Source: Wortsman et al., arXiv:2203.05482 (uniform soup).
    """
    if not experts:
        raise ShapeError("no adapter has this layer; a mean needs one at least.")
    return weighted_sum(experts, lam / len(experts))
