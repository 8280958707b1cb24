"""How large an update is: Frobenius norms from factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.factors import LowRank
from nscmerge.update import Update


def norm(weights: Mapping[str, LowRank | Tensor]) -> float:
    """Return the Frobenius norm over all layers together; one layer at a time, low-rank ones from their factors."""
    return math.sqrt(sum(_squared(weight) for weight in weights.values()))


def _squared(weight: LowRank | Tensor) -> float:
    if not isinstance(weight, LowRank):
        return float(weight.double().square().sum())
    A, B = weight.A.double(), weight.scaling * weight.B.double()
    # tr(A A^T B^T B), never the d_out x d_in product; rounding may leave a zero slightly negative.
    return max(0.0, float(((A @ A.T) * (B.T @ B)).sum()))


def growth(update: Update, experts: Mapping[str, Adapter]) -> float:
    """Return |merged update at scale 1| over the mean |expert update|, no unit; the mean over tasks for per-task ones.

    NaN where all experts are zero.
    """
    if update.per_task:
        merged = fmean(norm({**update.layers, **update.dense, **own}) for own in update.per_task.values())
    else:
        merged = norm({**update.layers, **update.dense})
    reference = fmean(norm({**expert.layers, **expert.dense}) for expert in experts.values())
    return merged / reference if reference else math.nan
