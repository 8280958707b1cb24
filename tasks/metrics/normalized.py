"""How much of an expert's score a merge keeps."""

from __future__ import annotations

import math
import warnings


def normalized_score(merged: float, expert: float, higher_is_better: bool) -> float:
    """Return the merged score in percent of the expert's: 100 is as good as the expert, more is better than it.

    merged / expert where higher is better, expert / merged where lower is better (the papers' normalized average).

    Args:
        merged: Score of the merge.
        expert: Score of the task's own expert, same metric and unit.
        higher_is_better: Direction of the metric.

    Returns:
        Percent. A negative correlation gives a negative score, which is meant. 0, with a warning, where the merged
        score is not finite, or is 0 where lower is better: a broken merge, or a metric that saw nothing, must neither
        lead a table nor drop out of its mean. NaN where the ratio says nothing: an expert that is not finite, or is at
        0 where higher is better.
    """
    merged, expert = float(merged), float(expert)
    if not math.isfinite(expert) or (higher_is_better and expert == 0):
        return math.nan
    if not math.isfinite(merged) or (not higher_is_better and merged == 0):
        direction = "higher" if higher_is_better else "lower"
        warnings.warn(
            f"a merged score of {merged:g} ({direction} is better, the expert has {expert:g}) counts as 0 percent.",
            stacklevel=2,
        )
        return 0.0
    return 100 * merged / expert if higher_is_better else 100 * expert / merged
