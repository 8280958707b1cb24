"""Stability and plasticity of one step: how much it moves old outputs, and how far it stays from the new expert's."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.continual.algebra import combine, thin_svd
from nscmerge.continual.right_vectors import right_vectors
from nscmerge.continual.state import Weight
from nscmerge.factors import LowRank

#: Columns of V_p and V_v, as NUFILT's own loss has them.
FILTER_RANK, TASK_RANK = 128, 8


def on_subspaces(
    old: Weight, merged: Weight, new: Weight, filter_rank: int = FILTER_RANK, task_rank: int = TASK_RANK
) -> tuple[float, float]:
    """Return (stability, plasticity) in parameter space: norm((M_t - M) V_p)^2 and norm((M_t - delta) V_v)^2.

    What NUFILT minimises, for any method; needs no data. Lower is better.

    Args:
        old: M = M_{t-1} of one layer, (d_out, d_in); V_p are its top right singular vectors.
        merged: M_t.
        new: delta_t; V_v are its top right singular vectors.
        filter_rank: Columns of V_p at most; no more than the rank of M.
        task_rank: Columns of V_v at most.

    Source: NUFILT, Eqs. 10-12; continual merging specification, section 5.
    """
    stability = _energy(combine((1.0, merged), (-1.0, old)), top_vectors(old, filter_rank))
    return stability, _energy(combine((1.0, merged), (-1.0, new)), top_vectors(new, task_rank))


def on_activations(
    old: Weight, merged: Weight, new: Weight, earlier: Tensor | None, own: Tensor
) -> tuple[float, float]:
    """Return (stability, plasticity) on inputs: the mean over i < t of E norm((M_t - M) x)^2, x from task i, and
    E norm((M_t - delta) x)^2, x from task t.

    With second moments C = E[x x^T] both are traces tr(D C D^T): no second forward pass. Mean over tokens and samples,
    sum over output units. Lower is better.

    Args:
        old: M = M_{t-1} of one layer, (d_out, d_in).
        merged: M_t.
        new: delta_t.
        earlier: Mean of the earlier tasks' C, (d_in, d_in); None where there is none, which gives 0.
        own: C of task t.

    Source: NUFILT, Eqs. 3-4, squared l2; continual merging specification, section 5.
    """
    stability = 0.0 if earlier is None else traced(combine((1.0, merged), (-1.0, old)), earlier)
    return stability, traced(combine((1.0, merged), (-1.0, new)), own)


def harmonic_mean(stability: float, plasticity: float) -> float:
    """Return 2 s p / (s + p), lower is better; 0 where both are 0."""
    total = stability + plasticity
    return 2 * stability * plasticity / total if total else 0.0


def top_vectors(weight: Weight, count: int) -> Tensor:
    """Return the top right singular vectors as columns, (d_in, n), n = min(count, rank)."""
    if isinstance(weight, LowRank):
        return thin_svd(weight)[2][:count].T
    return right_vectors(weight, count, svd="exact", seed=0)


def traced(weight: Weight, moment: Tensor) -> float:
    """Return tr(D C D^T) in fp64: the mean squared norm of D x.

    Args:
        weight: D, (d_out, d_in).
        moment: C = E[x x^T], (d_in, d_in).
    """
    C = moment.double()
    if isinstance(weight, Tensor):
        D = weight.double()
        return float(((D @ C) * D).sum())
    A, B = weight.A.double(), weight.scaling * weight.B.double()
    return max(0.0, float(((A @ C @ A.T) * (B.T @ B)).sum()))


def second_moment(inputs: Tensor) -> Tensor:
    """Return E[x x^T] of rows, (n, d) -> (d, d), fp64, not centred."""
    x = inputs.double()
    return x.T @ x / max(len(x), 1)


def _energy(weight: Weight, vectors: Tensor) -> float:
    """Return norm(D V)^2."""
    if isinstance(weight, Tensor):
        return float((weight.double() @ vectors.double()).square().sum())
    A, B = weight.A.double(), weight.scaling * weight.B.double()
    # Not through B^T B: what cancels would come out below zero.
    return float((B @ (A @ vectors.double())).square().sum())


def total(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean over layers of (stability, plasticity); zeros where there is no layer."""
    if not pairs:
        return 0.0, 0.0
    mean = torch.tensor(pairs, dtype=torch.float64).mean(0)
    return float(mean[0]), float(mean[1])
