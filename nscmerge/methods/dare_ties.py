"""DARE-TIES: drop entries at random and rescale the rest, then TIES."""

from __future__ import annotations

from nscmerge.methods.keep_masks import Masks, dropped, mask_source
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_choice, check_number
from nscmerge.methods.ties import dense
from nscmerge.methods.ties_space import Space, merge_by_signs, merge_by_values, trim_apart, trim_together
from nscmerge.methods.ties_steps import AGGS, Agg
from nscmerge.stack import Stack


def dare_ties(
    stack: Stack,
    *,
    lam: float = 1.0,
    density: float = 0.2,
    drop: float = 0.9,
    agg: Agg = "mean",
    seed: int = 0,
    keep_masks: Masks | None = None,
) -> Merged:
    """Return ``lam`` times the TIES merge of updates of which random entries were dropped and the rest rescaled.

    v_k becomes v_k m_k / (1 - drop) with m_k ~ Bernoulli(1 - drop); then TIES as in :func:`nscmerge.methods.ties.ties`.
    Where fewer than ``density`` of the entries are left, as with the defaults, the threshold is 0 and nothing is
    trimmed: so the reference programs have it too.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update.
        lam: Merge coefficient, no unit.
        density: Share of entries that each task keeps, in (0, 1].
        drop: Chance of an entry to be dropped, in [0, 1).
        agg: ``mean`` of the entries that agree, or their ``sum``.
        seed: Of the masks; each is drawn from (seed, method, task, layer) alone, whatever the order of either.
        keep_masks: Masks given instead of drawn: by task, then layer or tensor, bool of that layer's shape.

    Raises:
        MethodError: An option is out of range; masks are missing, of another shape, or of something unknown.

    Source: Yu et al., arXiv:2311.03099, with TIES as in their code and KnOTS's.
    """
    check_number("dare_ties", "density", density, "(0, 1]")
    check_choice("dare_ties", "agg", agg, AGGS)
    space = Space.of_deltas(stack)
    mask = mask_source("dare_ties", stack, [space], drop=drop, seed=seed, keep_masks=keep_masks)
    space, thresholds = trim_together(dropped(space, mask, drop), density)
    return dense(stack, merge_by_values(space, agg), lam, {"thresholds": thresholds})


def dare_ties_papercode(
    stack: Stack,
    *,
    lam: float = 1.0,
    density: float = 0.2,
    drop: float = 0.9,
    agg: Agg = "sum",
    seed: int = 0,
    keep_masks: Masks | None = None,
) -> Merged:
    """Return ``lam`` times NSC's DARE-TIES: trimmed per tensor, dropped after, elected by sign counts, summed.

    With the defaults 2 % of the entries survive, instead of 10 % in the original order.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update.
        lam: Merge coefficient, no unit.
        density: Share of entries that each task keeps of every tensor, in (0, 1].
        drop: Chance of an entry to be dropped, in [0, 1).
        agg: ``sum`` of the entries that agree, or their ``mean``.
        seed: Of the masks; each is drawn from (seed, method, task, layer) alone.
        keep_masks: Masks given instead of drawn: by task, then layer or tensor, bool of that layer's shape.

    Raises:
        MethodError: An option is out of range; masks are missing, of another shape, or of something unknown.

    Source: released code of NSC (arXiv:2603.26317), ``Ties`` with ``drop_p``; masks are drawn per name, not in turn.
    """
    check_number("dare_ties", "density", density, "(0, 1]")
    check_choice("dare_ties", "agg", agg, AGGS)
    space = Space.of_deltas(stack)
    mask = mask_source("dare_ties", stack, [space], drop=drop, seed=seed, keep_masks=keep_masks)
    return dense(stack, merge_by_signs(dropped(trim_apart(space, density), mask, drop), agg), lam)
