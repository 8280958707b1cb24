"""What a sequence of merges keeps of earlier tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from nscmerge.errors import ShapeError


def average_accuracy(matrix: Sequence[Sequence[float]] | Tensor) -> float:
    """Return ACC: the mean score of all tasks after the last step, in the unit of the scores.

    Args:
        matrix: ``a[t][i]``, score of the task at position i after step t, for i <= t; rows may be cut off after the
            diagonal or filled up with anything.

    Raises:
        ShapeError: No row, or a row that ends before the diagonal.
    """
    return fmean(_rows(matrix)[-1])


def backward_transfer(matrix: Sequence[Sequence[float]] | Tensor) -> float:
    """Return BWT: the mean over all tasks but the last of the final score minus the score just after its merging.

    Negative where later merges cost earlier tasks. Divided by T - 1; NaN for a single task, which has no later merge.
    Args and errors as :func:`average_accuracy`.
    """
    rows = _rows(matrix)
    if len(rows) == 1:
        return float("nan")
    return fmean(final - rows[i][i] for i, final in enumerate(rows[-1][:-1]))


def _rows(matrix: Sequence[Sequence[float]] | Tensor) -> list[list[float]]:
    rows = [[float(value) for value in row] for row in matrix]
    short = [t for t, row in enumerate(rows) if len(row) <= t]
    if not rows or short:
        what = f"row {short[0]} has {len(rows[short[0]])} scores" if rows else "the matrix has no row"
        raise ShapeError(f"{what}; expected a[t][i] for every step t and every i <= t: the lower triangle.")
    return [row[: t + 1] for t, row in enumerate(rows)]
