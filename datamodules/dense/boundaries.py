"""Boundary maps: what an edge detector is trained on, and what ods-F compares it with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import thin


def seg2bmap(segmentation: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a label map (H, W) differs from its east, south or south-east neighbour.

    Source: SEISM ``src/misc/seg2bmap.m``; the last row looks east only, the last column south only.
    """
    padded = np.pad(segmentation, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    boundary: NDArray[np.bool_] = (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])
    return boundary


def evaluation_boundaries(segmentation: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the boundary map (H, W) that ods-F matches with: :func:`seg2bmap`, thinned to lines of one pixel.

    Takes a label map (PASCAL-Context), or an edge map, which has regions as well (NYUD-v2); the latter's lines move by
    at most one pixel.

    Source: SEISM ``src/piotr_edges/edgesEvalImg.m``; for NYUD-v2 the family's ``seism/src/gt_wrappers/db_gt.m``.
    """
    thinned: NDArray[np.bool_] = thin(seg2bmap(segmentation))
    return thinned


def training_boundaries(segmentation: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where the 4-neighbour Laplacian of a label map (H, W) is not 0, thinned to lines of one pixel.

    Labels that cancel (a pixel halfway between two neighbours) leave a gap, as in the reference; at the border the
    map is mirrored about its outermost pixel.

    Source: ``data/pascal_context.py`` of the family's PASCAL-Context loader (``cv2.Laplacian``, then ``thin``).
    """
    padded = np.pad(segmentation.astype(np.float64), 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    thinned: NDArray[np.bool_] = thin(laplacian != 0)
    return thinned
