"""Recursive normalised cuts of a region graph (Shi and Malik, PAMI 2000), with dense eigenvectors.

What ``skimage.graph.cut_normalized`` does, for graphs of a few hundred regions: that computes up to a hundred
eigenvectors per cut with a randomly started iterative solver and uses one; here the one is computed, directly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from datamodules.scenes.primitives import Array


def normalized_cut(weights: Array, threshold: float, cuts: int) -> NDArray[np.int64]:
    """Return the number of the segment that each region falls into (n,), by the smallest region in it.

    Args:
        weights: Symmetric similarities of regions (n, n), 0 where they do not touch, self weights on the diagonal.
        threshold: A part is divided as long as its best cut costs less.
        cuts: Thresholds of the eigenvector that are tried for each cut.
    """
    labels = np.zeros(len(weights), dtype=np.int64)
    parts = [np.arange(len(weights))]
    while parts:
        part = parts.pop()
        side = _best_cut(weights[np.ix_(part, part)], threshold, cuts)
        if side is None:
            labels[part] = part.min()
        else:
            parts += [part[side], part[~side]]
    return labels


def _best_cut(weights: Array, threshold: float, cuts: int) -> NDArray[np.bool_] | None:
    """Return one side of the cheapest cut (n,), None if it costs ``threshold`` or more or there is nothing to cut."""
    if len(weights) <= 2:
        return None
    degree = weights.sum(axis=1)
    scale = 1 / np.sqrt(degree)
    laplacian = np.eye(len(weights)) - scale[:, None] * weights * scale
    _, vectors = eigh(laplacian, subset_by_index=[1, 1])
    vector = vectors[:, 0]
    low, high = vector.min(), vector.max()
    if np.isclose(low, high):
        return None
    sides = vector > np.linspace(low, high, cuts, endpoint=False)[:, None]  # (cuts, n)
    # What crosses a cut, over the weight of all that starts on either side.
    crossing = np.sum((sides @ weights) * ~sides, axis=1)
    inside = sides @ degree
    cost = crossing / inside + crossing / (degree.sum() - inside)
    best = int(np.argmin(cost))
    return sides[best] if cost[best] < threshold else None
