"""TIES: trim each task's update, elect a sign per entry, merge what agrees. Dense by nature, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nscmerge.lazy import Lazy
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_choice, check_number
from nscmerge.methods.ties_space import Merge, Space, merge_by_signs, merge_by_values, trim_apart, trim_together
from nscmerge.methods.ties_steps import AGGS, Agg
from nscmerge.stack import Stack


def ties(stack: Stack, *, lam: float = 1.0, density: float = 0.2, agg: Agg = "mean") -> Merged:
    """Return ``lam`` times the TIES merge: trimmed over all layers together, elected by summed values, disjoint mean.

    With v_k all deltas and whole tensors of task k as one vector of length N: keep entries of magnitude at or above the
    (N - int(density N))-th smallest; g = the sign of their sum over tasks, where that is 0 the sign of the sum of g
    over all entries; average the entries that have sign g. Layers are dense and computed when asked for; memory is a
    few layers.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update, and its entries count in N.
        lam: Merge coefficient, no unit.
        density: Share of entries that each task keeps, in (0, 1].
        agg: ``mean`` of the entries that agree, or their ``sum`` (AdaMerging's and FusionBench's default).

    Raises:
        MethodError: An option is out of range.

    Source: Yadav et al., arXiv:2306.01708; equal to their code on the concatenated deltas.
    """
    check_number("ties", "density", density, "(0, 1]")
    check_choice("ties", "agg", agg, AGGS)
    space, thresholds = trim_together(Space.of_deltas(stack), density)
    return dense(stack, merge_by_values(space, agg), lam, {"thresholds": thresholds})


def ties_papercode(stack: Stack, *, lam: float = 1.0, density: float = 0.2, agg: Agg = "sum") -> Merged:
    """Return ``lam`` times NSC's TIES: trimmed per tensor to an exact count, elected by sign counts, summed.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update.
        lam: Merge coefficient, no unit.
        density: Share of entries that each task keeps of every tensor, in (0, 1]; round(density n), one at least.
        agg: ``sum`` of the entries that agree, or their ``mean``.

    Raises:
        MethodError: An option is out of range.

    Source: released code of NSC (arXiv:2603.26317), ``Ties``; equal magnitudes at the edge are kept in order.
    """
    check_number("ties", "density", density, "(0, 1]")
    check_choice("ties", "agg", agg, AGGS)
    return dense(stack, merge_by_signs(trim_apart(Space.of_deltas(stack), density), agg), lam)


def dense(stack: Stack, merge: Merge, lam: float, report: Mapping[str, Any] | None = None) -> Merged:
    """Return ``lam`` times a merge of dense deltas, each layer and whole tensor computed when asked for."""

    def scaled(name: str) -> Tensor:
        return lam * merge(name)

    return Merged(Lazy(list(stack.layers), scaled), Lazy(list(stack.whole), scaled), report=report or {})
