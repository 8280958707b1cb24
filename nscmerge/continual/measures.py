"""What a step did, told without data: subspace overlaps, and the parameter-space forms of stability and plasticity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.continual.algebra import at_least_fp32, dense, factors, thin_svd
from nscmerge.continual.right_vectors import right_vectors
from nscmerge.continual.state import State, Weight
from nscmerge.continual.surrogates import FILTER_RANK, TASK_RANK
from nscmerge.factors import LowRank
from nscmerge.progress import Watch, quiet


def measure(
    before: State | None, expert: Adapter, after: State, watch: Watch = quiet
) -> dict[str, dict[str, float | int | None]]:
    """Return numbers about one step by name, for every matrix that the expert has and that is not zero.

    With V_p (d_in, p) and V_v (d_in, q) the top right singular vectors of M_{t-1} and of delta_t, p at most 128 and q
    at most 8 (NUFILT's own ranks where it made the step):

    - ``rank_task``, ``rank_merged``: numerical ranks of delta_t and M_t; None for dense matrices.
    - ``overlap_before``, ``overlap_after``: share of V_v inside the top p vectors of M_{t-1}, of M_t:
      norm(V_p^T V_v)^2 / q, in [0, 1]. ``expected``: p / d_in, what an unrelated subspace has of M_{t-1}.
    - ``stability``: norm((M_t - M_{t-1}) V_p)^2 / norm(M_{t-1} V_p)^2, how far the step moved what was there.
    - ``plasticity``: norm((M_t - delta_t) V_v)^2 / norm(delta_t V_v)^2, how far the merge is from the task where the
      task acts. Both 0 at best.

    The first step has none that need M_0 = 0. Dense matrices: randomised vectors (4 power iterations), fixed seed.

    Source: continual merging specification, section 5: Eqs. 3-4 of the NUFILT paper in parameter space.
    """
    p = int(after.options.get("filter_rank") or FILTER_RANK)
    q = int(after.options.get("task_rank") or TASK_RANK)
    found: dict[str, dict[str, Any]] = {}
    for name in watch(sorted([*expert.layers, *expert.dense]), "measuring"):
        if len(after.shapes[name]) != 2:
            continue
        new = expert.layers[name] if name in expert.layers else expert.dense[name]
        old = before.weight(name) if before is not None and name in before.shapes else None
        if line := _line(old, new, after.weight(name), p, q):
            found[name] = line
    return found


def _line(old: Weight | None, new: Weight, merged: Weight, p: int, q: int) -> dict[str, Any]:
    task, Vv = _vectors(new, q)
    if not Vv.shape[1]:
        return {}
    rank_merged, Vm = _vectors(merged, p)
    goal = _times(new, Vv)
    line: dict[str, Any] = {
        "rank_task": task,
        "rank_merged": rank_merged,
        "overlap_after": _overlap(Vm, Vv),
        "plasticity": _share(_times(merged, Vv) - goal, goal),
    }
    if old is None:
        return line
    _, Vp = _vectors(old, p)
    if not Vp.shape[1]:
        return line
    held = _times(old, Vp)
    return line | {
        "overlap_before": _overlap(Vp, Vv),
        "expected": Vp.shape[1] / Vp.shape[0],
        "stability": _share(_times(merged, Vp) - held, held),
    }


def _vectors(weight: Weight, count: int) -> tuple[int | None, Tensor]:
    """Return the numerical rank (None if dense) and the top right singular vectors as columns, fp64."""
    if isinstance(weight, LowRank):
        _, s, vh = thin_svd(weight)
        return len(s), vh[:count].T
    matrix = at_least_fp32(weight)
    if not bool(matrix.any()):
        return 0, matrix.new_zeros(matrix.shape[1], 0, dtype=torch.float64)
    return None, right_vectors(matrix, count, svd="randomized", seed=0).double()


def _times(weight: Weight, V: Tensor) -> Tensor:
    """Return X V in fp64, without X where it is factors."""
    if isinstance(weight, LowRank):
        A, B = factors(weight)
        return B @ (A @ V)
    matrix = dense(weight)
    return (matrix @ V.to(matrix.dtype)).double()


def _overlap(V: Tensor, Vv: Tensor) -> float:
    return float((V.T @ Vv).square().sum() / Vv.shape[1])


def _share(difference: Tensor, whole: Tensor) -> float:
    return float(difference.square().sum() / whole.square().sum())
