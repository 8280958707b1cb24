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
        found += [f"{name}: {sign}" for sign in _of_curve(curve, grid, growth)]
    return found


def _of_curve(curve: Curve, grid: Grid, growth: float) -> Iterator[str]:
    if curve.non_finite:
        yield f"{curve.non_finite} of {len(curve.points)} values are not finite."
    if (chosen := curve.chosen) is None:
        return
    coarse = grid.coarse()
    for edge, end in ((coarse[0], "start"), (coarse[-1], "stop")):
        if abs(chosen - edge) < grid.step and chosen in (edge, min(curve.points), max(curve.points)):
            yield f"the best scale {chosen:g} is at the {end} of the grid; the optimum may lie beyond."
