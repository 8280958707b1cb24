"""Non-maximum suppression of an edge map, as the SEISM benchmark and Structured Edge Detection do it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

Map = NDArray[np.float64]

_TRIANGLE = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
#: An edge survives beside a neighbour that is stronger by less than this factor.
_MARGIN = 1.01
#: Width of the rim in which edges fade out, pixels.
_RIM = 5


def orientation(strength: Map) -> Map:
    """Return the direction across the edge at every pixel, in radians, [0, pi), from the smoothed map's curvature.

    Triangle filter of radius 4 with a mirrored border, then second differences (``edgesNms`` of Dollar and Zitnick).

    Args:
        strength: (H, W), at least 2 pixels in both directions.
    """
    smooth = correlate1d(correlate1d(strength, _TRIANGLE, axis=0, mode="reflect"), _TRIANGLE, axis=1, mode="reflect")
    dy, dx = np.gradient(smooth)
    dyy, dxy = np.gradient(dy)
    dxx = np.gradient(dx, axis=1)
    return np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)), np.pi)


def suppress(strength: Map) -> Map:
    """Return the map with a pixel set to 0 where a neighbour across the edge is stronger, and faded towards its rim.

    Neighbours lie at distance 1 on both sides, interpolated; a pixel stays unless 1.01 times its strength is below one
    of them. The rim of 5 pixels is multiplied by k / 5 at distance k from the border. The map itself is not smoothed
    (others apply a filter of radius 1 first).

    Args:
        strength: In [0, 1], (H, W); a map less than 2 pixels wide or high has no direction and only fades.

    Source: ``edgesNmsMex.cpp`` of Structured Edge Detection, with r 1, s 5, m 1.01.
    """
    rows, columns = np.nonzero(strength)
    value = strength[rows, columns]
    keep = np.ones(len(value), dtype=bool)
    if min(strength.shape) >= 2:
        angle = orientation(strength)[rows, columns]
        for side in (-1, 1):
            across = _interpolate(strength, rows + side * np.sin(angle), columns + side * np.cos(angle))
            keep &= value * _MARGIN >= across
    kept = np.zeros_like(strength)
    kept[rows[keep], columns[keep]] = value[keep]
    height, width = strength.shape
    return kept * _fade(height)[:, None] * _fade(width)


def _interpolate(image: Map, y: Map, x: Map) -> Map:
    """Return bilinear values at (y, x); outside, those just inside the border."""
    height, width = image.shape
    y, x = np.clip(y, 0, height - 1.001), np.clip(x, 0, width - 1.001)
    top, left = y.astype(np.intp), x.astype(np.intp)
    v, u = y - top, x - left
    above = image[top, left] * (1 - u) + image[top, left + 1] * u
    below = image[top + 1, left] * (1 - u) + image[top + 1, left + 1] * u
    return above * (1 - v) + below * v


def _fade(length: int) -> Map:
    factors = np.ones(length)
    rim = min(_RIM, length // 2)
    for k in range(rim):
        factors[k] = factors[length - 1 - k] = k / rim
    return factors
