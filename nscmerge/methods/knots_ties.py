"""KnOTS-TIES: TIES on components in a common basis; the result is low-rank."""

from __future__ import annotations

from nscmerge.methods.kinds import Merged
from nscmerge.methods.knots import align_all, assemble, component_space
from nscmerge.methods.options import check_choice, check_number
from nscmerge.methods.ties_space import Space, merge_by_signs, merge_by_values, trim_apart, trim_together
from nscmerge.methods.ties_steps import AGGS, Agg
from nscmerge.stack import Stack


def knots_ties(stack: Stack, *, lam: float = 1.0, density: float = 0.2, agg: Agg = "mean") -> Merged:
    """Return ``lam`` times the TIES merge of all tasks' components in one basis per layer, as factors.

    [delta_1 .. delta_K] = U [C_1 .. C_K] per layer by an exact SVD in factor space; TIES over the C_k of all layers
    together gives C; the merge is U C of rank at most min(R, d_out). Whole tensors are TIES'd in their own space.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update. Ranks may differ.
        lam: Merge coefficient, no unit; it goes into B.
        density: Share of the components' entries that each task keeps, in (0, 1].
        agg: ``mean`` of the entries that agree, or their ``sum``.

    Raises:
        MethodError: An option is out of range.

    Source: Stoica et al., arXiv:2410.19735; their code, but whole tensors are merged rather than left out.
    """
    check_number("knots_ties", "density", density, "(0, 1]")
    check_choice("knots_ties", "agg", agg, AGGS)
    aligned, report = align_all(stack, "knots_ties")
    components, thresholds = trim_together(component_space(stack, aligned), density)
    whole, whole_thresholds = trim_together(Space.of_whole(stack), density)
    report |= {"thresholds": thresholds} | ({"whole_thresholds": whole_thresholds} if stack.whole else {})
    merge, merge_whole = merge_by_values(components, agg), merge_by_values(whole, agg)
    return assemble(stack, aligned, merge, merge_whole, lam, report)


def knots_ties_papercode(stack: Stack, *, lam: float = 1.0, density: float = 0.2, agg: Agg = "sum") -> Merged:
    """Return ``lam`` times NSC's KnOTS-TIES: trimmed per layer to an exact count, elected by sign counts, summed.

    Ties of signs go to +, so that the result depends on the signs which an SVD leaves open (38 % of the norm under
    random flips); ours are fixed by the basis, theirs by the SVD routine: only the step from components to their merge
    can be compared.

    Args:
        stack: K adapters; a layer that a task lacks is a zero update. Ranks may differ.
        lam: Merge coefficient, no unit; it goes into B.
        density: Share of the components' entries that each task keeps per layer, in (0, 1].
        agg: ``sum`` of the entries that agree, or their ``mean``.

    Raises:
        MethodError: An option is out of range.

    Source: released code of NSC (arXiv:2603.26317), ``KnOTS``; our SVD is in fp64, theirs in fp32.
    """
    check_number("knots_ties", "density", density, "(0, 1]")
    check_choice("knots_ties", "agg", agg, AGGS)
    aligned, report = align_all(stack, "knots_ties")
    components = trim_apart(component_space(stack, aligned), density)
    whole = trim_apart(Space.of_whole(stack), density)
    return assemble(stack, aligned, merge_by_signs(components, agg), merge_by_signs(whole, agg), lam, report)
