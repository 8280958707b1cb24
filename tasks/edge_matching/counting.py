"""Counts of one image: how many boundary pixels are found at every threshold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nscmerge.errors import ShapeError
from tasks.edge_matching.matching import matched_pairs
from tasks.edge_matching.protocol import Protocol
from tasks.edge_matching.suppression import suppress
from tasks.edge_matching.thinning import thin

#: Per threshold: matched pairs, boundary pixels, predicted pixels; int64 (T, 3).
Counts = NDArray[np.int64]


def count_image(levels: NDArray[np.uint8], boundary: NDArray[np.bool_], protocol: Protocol) -> Counts:
    """Return the counts of one image, int64 (T, 3): matched pairs, boundary pixels, predicted pixels.

    Suppress once; for every threshold thin what is above it and match that with the boundary one to one.

    Args:
        levels: Edge strength in 8 bit at the image's own size, (H, W).
        boundary: (H, W), bool, lines of one pixel.
        protocol: Distance, thresholds, suppression.

    Raises:
        ShapeError: The two differ in size.
    """
    if levels.ndim != 2 or levels.shape != boundary.shape:
        raise ShapeError(f"edge map is {levels.shape}, boundary {boundary.shape}; expected (H, W) twice.")
    strength = levels / 255
    if protocol.nms:
        strength = suppress(strength)
    height, width = levels.shape
    radius = protocol.radius((height, width))
    counts = np.zeros((len(protocol.thresholds), 3), np.int64)
    counts[:, 1] = np.count_nonzero(boundary)
    size = 0
    for row, threshold in enumerate(protocol.thresholds):
        above = strength > threshold
        # Maps of one image are nested: equal size, equal map. 8 bit and 101 thresholds give many repeats.
        if (count := int(np.count_nonzero(above))) == size and row:
            counts[row] = counts[row - 1]
            continue
        size = count
        thinned = thin(above)
        counts[row, 0] = matched_pairs(thinned, boundary, radius)
        counts[row, 2] = np.count_nonzero(thinned)
    return counts
