"""Warning signs: what in the curves themselves calls a choice into question, without knowing any answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nscmerge.search.curve import Curve
from nscmerge.search.grid import Grid


def signs(curves: Mapping[str, Curve], grid: Grid, growth: float) -> list[str]:
    """Return one sentence per sign.

    Args:
        curves: All curves of one method.
        grid: The scales that were tried.
        growth: |update at scale 1| over the mean |expert update|.
    """
    found = []
    for name, curve in curves.items():
        found += [f"{name}: {sign}" for sign in (*_any(curve, grid), *_label_free(curve, growth))]
    return [*found, *_readings(curves, grid)]


def _any(curve: Curve, grid: Grid) -> Iterator[str]:
    if curve.non_finite:
        yield f"{curve.non_finite} of {len(curve.points)} values are not finite."
    coarse = grid.coarse()
    # The fine grid may step over an end of the coarse one; what lies beyond has not been looked at either.
    if (chosen := curve.chosen) is not None and len(coarse) > 1:
        for outside, end in ((chosen <= coarse[0], "start"), (chosen >= coarse[-1], "stop")):
            if outside:
                yield f"the best scale {chosen:g} is at the {end} of the grid; the optimum may lie beyond."


def _label_free(curve: Curve, growth: float) -> Iterator[str]:
    """Signs for criteria that no expert should be beaten by: labels would say whether a merge is good, these do not."""
    chosen = curve.chosen
    if chosen is None or not curve.expert_bounds:
        return
    value, expert = curve.points[chosen].total, curve.expert.total
    if value < expert:
        yield f"at the best scale {chosen:g} it is {value:.4f}, below the experts' own {expert:.4f}."
    if chosen * growth > 1:
        yield (
            f"at the best scale {chosen:g} the merged update is {chosen * growth:.2f} times as large as the mean "
            "expert's."
        )


def _readings(curves: Mapping[str, Curve], grid: Grid) -> Iterator[str]:
    """Layer choices of one criterion that disagree by more than two coarse steps."""
    groups: dict[str, dict[str, float]] = {}
    for name, curve in curves.items():
        if curve.chosen is not None:
            groups.setdefault(name.partition(".")[0], {})[name] = curve.chosen
    for chosen in groups.values():
        if max(chosen.values()) - min(chosen.values()) > 2.5 * grid.step:
            yield f"readings disagree: {', '.join(f'{name} {lam:g}' for name, lam in chosen.items())}."
