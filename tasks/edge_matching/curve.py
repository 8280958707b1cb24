"""From counts to scores: ODS, OIS, average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.edge_matching.counting import Counts


@dataclass(frozen=True)
class EdgeScores:
    """Scores of a set of images.

    Attributes:
        ods_f: Largest F over one threshold for all images, [0, 1].
        threshold: That threshold, the lowest of equals.
        ois_f: F where every image has its own best threshold.
        average_precision: Mean precision at recalls 0, 0.01 ... 1, 0 outside the recalls that occur. The original
            divides the same sum by 100, not 101.
        table: Threshold, recall, precision, F, one row per threshold, (T, 4).
    """

    ods_f: float
    threshold: float
    ois_f: float
    average_precision: float
    table: NDArray[np.float64]


def rates(counts: Counts) -> NDArray[np.float64]:
    """Return recall, precision and F, (T, 3), of matched, boundary and predicted pixels, (T, 3); 0 where 0 / 0."""
    matched, boundary, predicted = counts.astype(np.float64).T
    recall = matched / np.maximum(boundary, 1)
    precision = matched / np.maximum(predicted, 1)
    # 2 P R / (P + R) in counts; one boundary map per image, so the same pairs count for both.
    f = 2 * matched / np.maximum(boundary + predicted, 1)
    return np.stack([recall, precision, f], axis=1)


def best_row(counts: Counts) -> Counts:
    """Return the counts of one image at its own best threshold, (3,), the lowest of equals."""
    return counts[rates(counts)[:, 2].argmax()]


def scores(total: Counts, best: Counts, thresholds: Sequence[float]) -> EdgeScores:
    """Return the scores of a set.

    Args:
        total: Counts summed over all images, (T, 3).
        best: :func:`best_row` summed over all images, (3,).
        thresholds: T of them.
    """
    table = np.column_stack([thresholds, rates(total)])
    row = int(table[:, 3].argmax())
    ois_f = float(rates(best[None])[0, 2])
    return EdgeScores(
        float(table[row, 3]), float(table[row, 0]), ois_f, _average_precision(table[:, 1], table[:, 2]), table
    )


def _average_precision(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    occurring, place = np.unique(recall, return_inverse=True)
    best = np.zeros(len(occurring))
    np.maximum.at(best, place, precision)
    levels = np.linspace(0, 1, 101)
    return float(np.interp(levels, occurring, best, left=0, right=0).mean())
