"""Unsupervised segments: superpixels parted by normalised cuts, from colour (2D) or depth, normals and edges (2.5D).

Lengths scale with H / 512, areas with its square, but for the least superpixel in colour, which the recipe leaves at
skimage's 20 pixels.

Source: EPFL-VILAB/omnidata, ``omnidata_annotator/scripts/create_segmentation_{2d,25d}_images.py``.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.segmentation import felzenszwalb

from datamodules.scenes.cues import HOLE, REFERENCE_HEIGHT
from datamodules.scenes.normalized_cut import normalized_cut
from datamodules.scenes.primitives import Array

#: Fewest pixels of a superpixel in geometry, which images below 128 pixels need lest nearly every pixel be one.
LEAST = 12


def segments_2d(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return segments of a colour image (H, W, 3), ids stretched to 0..255 (H, W)."""
    scale = len(image) / REFERENCE_HEIGHT
    superpixels = felzenszwalb(image, scale=200 * scale**2, sigma=3 * scale, min_size=20)
    return _joined(image.astype(np.float64), superpixels, threshold=0.005, cuts=10, self_weight=2.0)


def segments_25d(
    depth_code: NDArray[np.uint16], normal_code: NDArray[np.uint8], edge_code: NDArray[np.uint16]
) -> NDArray[np.uint8]:
    """Return segments of geometry, ids stretched to 0..255 (H, W).

    Args:
        depth_code: z-depth in 1/512 m (H, W), 65535 at holes.
        normal_code: Normals as 8-bit codes (H, W, 3).
        edge_code: Occlusion edges as 16-bit codes (H, W).
    """
    scale = len(depth_code) / REFERENCE_HEIGHT
    known = depth_code < HOLE - 1
    depth = 2 * _smooth(np.log(np.maximum(depth_code, 1)) / 16, known, scale)
    normal = [_smooth(normal_code[..., axis] / 255, known, 2 * scale) for axis in range(3)]
    channels = np.stack([depth, *normal, 10 * edge_code / 255 / 255], axis=-1)
    with warnings.catch_warnings():
        # It wonders about images of five channels, which these are.
        warnings.simplefilter("ignore", RuntimeWarning)
        superpixels = felzenszwalb(channels, scale=200 * scale**2, sigma=0, min_size=max(LEAST, round(200 * scale**2)))
    return _joined(channels, superpixels, threshold=1.0, cuts=100, self_weight=1.0)


def _smooth(values: Array, known: NDArray[np.bool_], sigma: float) -> Array:
    """Return a Gaussian mean (H, W) over known pixels; 0 where none is near."""
    share = gaussian(known.astype(np.float64), sigma, mode="constant")
    total = gaussian(np.where(known, values, 0.0), sigma, mode="constant")
    return np.asarray(total / (share + np.finfo(np.float64).eps))


def _joined(
    channels: Array, superpixels: NDArray[np.int64], threshold: float, cuts: int, self_weight: float
) -> NDArray[np.uint8]:
    count = int(superpixels.max()) + 1
    flat = superpixels.ravel()
    sizes = np.bincount(flat, minlength=count)
    means = np.stack([np.bincount(flat, weights=c) / sizes for c in channels.reshape(len(flat), -1).T], axis=-1)
    touching = np.zeros((count, count), dtype=bool)
    # Each pixel touches eight others; four of them, seen from both sides, are all.
    for one, other in (
        (superpixels[:, :-1], superpixels[:, 1:]),
        (superpixels[:-1], superpixels[1:]),
        (superpixels[:-1, :-1], superpixels[1:, 1:]),
        (superpixels[:-1, 1:], superpixels[1:, :-1]),
    ):
        touching[one, other] = touching[other, one] = True
    squared = np.sum((means[:, None] - means) ** 2, axis=-1)
    weights = np.where(touching, np.exp(-squared / 255), 0.0)
    np.fill_diagonal(weights, self_weight)
    _, labels = np.unique(normalized_cut(weights, threshold, cuts)[superpixels], return_inverse=True)
    labels = labels.reshape(superpixels.shape)
    return np.round(255 * labels / max(int(labels.max()), 1)).astype(np.uint8)
