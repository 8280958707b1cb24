"""KnOTS-DARE-TIES: DARE-TIES on components in a common basis; the result is low-rank."""

from __future__ import annotations

from nscmerge.methods.keep_masks import Masks, dropped, mask_source
from nscmerge.methods.kinds import Merged
from nscmerge.methods.knots import align_all, assemble, component_space
from nscmerge.methods.options import check_choice, check_number, check_whole
from nscmerge.methods.ties_space import Space, merge_by_signs, merge_by_values, trim_apart, trim_together
from nscmerge.methods.ties_steps import AGGS, Agg
from nscmerge.stack import Stack

_NAME = "knots_dare_ties"


def knots_dare_ties(
    stack: Stack,
    *,
    lam: float = 1.0,
    density: float = 0.2,
    drop: float = 0.9,
    agg: Agg = "mean",
    seed: int = 0,
    keep_masks: Masks | None = None,
) -> Merged:
    """Return ``lam`` times the DARE-TIES merge of all tasks' components in one basis per layer, as factors.

    As :func:`nscmerge.methods.knots_ties.knots_ties`, with entries of the components C_k dropped at random and the
    rest divided by 1 - drop before the trim. Whole tensors are DARE-TIES'd in their own space.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update. Ranks may differ.
        lam: Merge coefficient, no unit; it goes into B.
        density: Share of the components' entries that each task keeps, in (0, 1].
        drop: Chance of an entry to be dropped, in [0, 1).
        agg: ``mean`` of the entries that agree, or their ``sum``.
        seed: Of the masks; each is drawn from (seed, method, task, layer) alone, whatever the order of either.
        keep_masks: Masks given instead of drawn: by task, then by layer (rho, d_in), rows by descending singular value
            (rho components are above the cut), or by whole tensor, of its shape. Bool, True where an entry is kept.

    Raises:
        MethodError: An option is out of range; masks are missing, of another shape, or of something unknown.

    Source: Stoica et al., arXiv:2410.19735, with DARE as in their code; whole tensors are merged rather than left out.
    """
    _check(density, drop, agg, seed)
    aligned, report = align_all(stack, _NAME)
    components, whole = component_space(stack, aligned), Space.of_whole(stack)
    mask = mask_source(_NAME, stack, [components, whole], drop=drop, seed=seed, keep_masks=keep_masks)
    components, thresholds = trim_together(dropped(components, mask, drop), density)
    whole, whole_thresholds = trim_together(dropped(whole, mask, drop), density)
    report |= {"thresholds": thresholds} | ({"whole_thresholds": whole_thresholds} if stack.whole else {})
    return assemble(stack, aligned, merge_by_values(components, agg), merge_by_values(whole, agg), lam, report)


def knots_dare_ties_papercode(
    stack: Stack,
    *,
    lam: float = 1.0,
    density: float = 0.2,
    drop: float = 0.9,
    agg: Agg = "sum",
    seed: int = 0,
    keep_masks: Masks | None = None,
) -> Merged:
    """Return ``lam`` times NSC's KnOTS-DARE-TIES: trimmed per layer, dropped after, elected by sign counts, summed.

    Ties of signs go to +, so that the result depends on the signs which an SVD leaves open; ours are fixed by the
    basis. Only the step from components to their merge can be compared with the authors' program.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update. Ranks may differ.
        lam: Merge coefficient, no unit; it goes into B.
        density: Share of the components' entries that each task keeps per layer, in (0, 1].
        drop: Chance of an entry to be dropped, in [0, 1).
        agg: ``sum`` of the entries that agree, or their ``mean``.
        seed: Of the masks; each is drawn from (seed, method, task, layer) alone.
        keep_masks: Masks given instead of drawn: by task, then by layer (rho, d_in) or whole tensor.

    Raises:
        MethodError: An option is out of range; masks are missing, of another shape, or of something unknown.

    Source: released code of NSC (arXiv:2603.26317), ``KnOTS`` with ``drop_p``; our SVD is in fp64, theirs in fp32.
    """
    _check(density, drop, agg, seed)
    aligned, report = align_all(stack, _NAME)
    components, whole = component_space(stack, aligned), Space.of_whole(stack)
    mask = mask_source(_NAME, stack, [components, whole], drop=drop, seed=seed, keep_masks=keep_masks)
    components = dropped(trim_apart(components, density), mask, drop)
    whole = dropped(trim_apart(whole, density), mask, drop)
    return assemble(stack, aligned, merge_by_signs(components, agg), merge_by_signs(whole, agg), lam, report)


def _check(density: object, drop: object, agg: object, seed: object) -> None:
    """Refuse options before the SVDs, which take time."""
    check_number(_NAME, "density", density, "(0, 1]")
    check_number(_NAME, "drop", drop, "[0, 1)")
    check_choice(_NAME, "agg", agg, AGGS)
    check_whole(_NAME, "seed", seed)
