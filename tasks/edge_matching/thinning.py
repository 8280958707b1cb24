"""Morphological thinning to lines of one pixel, on the set pixels alone: an edge map is nearly empty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _tables() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return, for the two half-steps, which of the 256 neighbourhoods delete their centre.

    Bit k of a neighbourhood is neighbour x_(k+1), counted anticlockwise from the east.
    """
    bits = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(bool)
    x1, x2, x3, x4, x5, x6, x7, x8 = bits.T
    odd, even, following = bits[:, 0::2], bits[:, 1::2], bits[:, [2, 4, 6, 0]]
    crossings = (~odd & (even | following)).sum(1)
    neighbours = np.minimum((odd | even).sum(1), (even | following).sum(1))
    both = (crossings == 1) & (neighbours >= 2) & (neighbours <= 3)
    return both & ~((x2 | x3 | ~x8) & x1), both & ~((x6 | x7 | ~x4) & x5)


_DELETES = _tables()


def thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask thinned to convergence; the same as ``skimage.morphology.thin`` and MATLAB's ``bwmorph``.

    Args:
        mask: (H, W), bool.

    Source: Guo and Hall 1989, in the form of Lam, Lee and Suen 1992.
    """
    height, width = mask.shape
    stride = width + 2
    grid = np.zeros((height + 2, stride), np.uint8)
    grid[1:-1, 1:-1] = mask
    flat = grid.reshape(-1)
    steps = (1, 1 - stride, -stride, -1 - stride, -1, stride - 1, stride, stride + 1)
    rows, columns = np.divmod(np.flatnonzero(mask), max(width, 1))
    pixels = (rows + 1) * stride + columns + 1
    before = -1
    while len(pixels) != before:
        before = len(pixels)
        for deletes in _DELETES:
            code = flat[pixels + steps[0]]
            for bit, step in enumerate(steps[1:], start=1):
                code |= flat[pixels + step] << bit
            gone = deletes[code]
            flat[pixels[gone]] = 0
            pixels = pixels[~gone]
    return grid[1:-1, 1:-1].astype(bool)
