"""How much of an expert's score a merge keeps."""

from __future__ import annotations

import math


def normalized_score(merged: float, expert: float, higher_is_better: bool) -> float:
    """Return the merged score in percent of the expert's: 100 is as good as the expert, more is better than it.

    merged / expert where higher is better, expert / merged where lower is better (the papers' normalized average).

    Args:
        merged: Score of the merge.
        expert: Score of the task's own expert, same metric and unit.
        higher_is_better: Direction of the metric.

    Returns:
        Percent. A negative correlation gives a negative score, which is meant. NaN where the ratio says nothing: an
        expert at 0 where higher is better, or a NaN on either side. Where lower is better a merge at 0 gives infinity,
        or 100 if the expert is at 0 too.
    """
    merged, expert = float(merged), float(expert)
    above, below = (merged, expert) if higher_is_better else (expert, merged)
    if below == 0:
        if higher_is_better or math.isnan(above):
            return math.nan
        return 100.0 if above == 0 else math.inf
    return 100 * above / below
