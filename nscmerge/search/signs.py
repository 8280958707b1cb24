"""Warning signs: what calls a choice into question without knowing any answer; docs/search.md says how well they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nscmerge.search.curve import Curve
from nscmerge.search.grid import Grid

#: Size of the merged update at a label-free choice, over the mean expert's, outside of which the choice is suspect. Set
#: after the fact on the six text tasks: 34 of 36 bad choices lie outside, 18 of 24 good ones inside.
SIZES = (0.5, 1.3)


def signs(curves: Mapping[str, Curve], grid: Grid, growth: float) -> list[str]:
    """Return one sentence per sign.

    Args:
        curves: All curves of one method.
        grid: The scales that were tried.
        growth: |update at scale 1| over the mean |expert update|.
    """
    return [f"{name}: {sign}" for name, curve in curves.items() for sign in _of_curve(curve, grid, growth)]


def _of_curve(curve: Curve, grid: Grid, growth: float) -> Iterator[str]:
    if curve.non_finite:
        yield f"{curve.non_finite} of {len(curve.points)} values are not finite."
    if (chosen := curve.chosen) is None:
        return
    coarse = grid.coarse()
    # The fine grid may step over an end of the coarse one; what lies beyond has not been looked at either.
    for outside, end in ((chosen <= coarse[0], "start"), (chosen >= coarse[-1], "stop")):
        if outside and len(coarse) > 1:
            yield f"the best scale {chosen:g} is at the {end} of the grid; the optimum may lie beyond."
    low, high = SIZES
    if curve.label_free and not low <= chosen * growth <= high:
        yield (
            f"at the best scale {chosen:g} the merged update is {chosen * growth:.2f} times as large as the mean "
            f"expert's; between {low} and {high} one can be less wary."
        )
