"""Maps of the Taskonomy domains that follow from pixels, depth or normals: edges, keypoints, curvature, reshading.

Recipes are those of Omnidata's annotator, with the constants that reproduce its released files. They were made for
images 512 pixels high; for others every length in pixels is scaled by H / 512.

Source: EPFL-VILAB/omnidata, ``omnidata_annotator/scripts``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.feature import hessian_matrix_det
from skimage.filters import gaussian, sobel

from datamodules.scenes.primitives import Array
from datamodules.scenes.render import FALL_OFF, Frame

#: Image height that the recipes' lengths in pixels were made for.
REFERENCE_HEIGHT = 512
#: Depth code (1/512 m) of a hole.
HOLE = 65535


def luma(image: NDArray[np.uint8]) -> Array:
    """Return the grey value in [0, 1] (H, W) of a colour image (H, W, 3), as Pillow's mode L has it."""
    return np.asarray(Image.fromarray(image).convert("L"), dtype=np.float64) / 255


def texture_edge(grey: Array) -> Array:
    """Return the gradient magnitude of ``grey`` (H, W) in [0, 1] after smoothing (sigma 3 at 512), border-normed."""
    sigma = 3 * len(grey) / REFERENCE_HEIGHT
    share = gaussian(np.ones_like(grey), sigma, mode="constant")
    return np.asarray(sobel(gaussian(grey, sigma, mode="constant") / share))


def occlusion_edge(depth_code: NDArray[np.uint16]) -> Array:
    """Return the gradient magnitude of the square root of depth in [0, 1] (H, W), without smoothing; 0 at holes.

    Args:
        depth_code: z-depth in 1/512 m (H, W), 65535 at holes.
    """
    return np.asarray(sobel(np.sqrt(depth_code.astype(np.float64)) / 256, mask=depth_code < HOLE - 499))


def keypoints_2d(grey: Array) -> Array:
    """Return the largest approximate determinant of the Hessian over ten scales (sigma 1 to 30 at 512), at least 0.

    Its box filters answer to mere brightness unless their side, 3 sigma, is an odd multiple of three; at 512 pixels
    that is little, on small images nearly all. So sigmas of smaller images are rounded to odd numbers.
    """
    sigmas = np.linspace(1, 30, 10) * len(grey) / REFERENCE_HEIGHT
    if len(grey) < REFERENCE_HEIGHT:
        sigmas = np.unique(2 * np.round((np.maximum(sigmas, 1) - 1) / 2) + 1)
    responses = [hessian_matrix_det(grey, sigma, approximate=True) for sigma in sigmas]
    return np.clip(np.max(responses, axis=0), 0, 1)


def keypoints_3d(frame: Frame, support: float = 0.3) -> Array:
    """Return a normal-dispersion stand-in for NARF interest: 0.85 (1 - length of the mean normal), 0 at holes (H, W).

    Args:
        frame: Rendered view.
        support: Side in metres of the square window around each pixel, which spans ``support`` at the pixel's depth.
    """
    height, width = frame.size
    known = ~frame.hole
    depth = np.where(known, frame.depth, 1.0)
    half = np.round(support / 2 * frame.camera.focal_length(frame.size) / depth).astype(int)
    half = np.clip(half, 1, max(frame.size))
    values = np.concatenate([np.where(known[..., None], frame.normal, 0.0), known[..., None]], axis=-1)
    sums = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0), (0, 0)))
    v, u = np.mgrid[:height, :width]
    top, bottom = np.maximum(v - half, 0), np.minimum(v + half + 1, height)
    left, right = np.maximum(u - half, 0), np.minimum(u + half + 1, width)
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    length = np.linalg.norm(total[..., :3], axis=-1) / np.maximum(total[..., 3], 1)
    return np.where(known, 0.85 * np.clip(1 - length, 0, 1), 0.0)


def reshading(frame: Frame) -> NDArray[np.uint8]:
    """Return the brightness 0..255 (H, W) under one light at the camera, 0 at holes."""
    distance = np.where(frame.hole, 0.0, frame.distance)
    value = np.minimum(255, np.round(400 * frame.cosine * FALL_OFF / (FALL_OFF + distance**2)))
    return np.where(frame.hole, 0, value).astype(np.uint8)


def principal_curvature(frame: Frame) -> NDArray[np.uint8]:
    """Return both curvatures as R and G (H, W, 3): -1/0.03 to 1/0.03 1/m as 0..254, 127 at holes; B is 0."""
    curvature = np.where(frame.hole[..., None], 0.0, np.clip(frame.curvature, -1 / 0.03, 1 / 0.03))
    code = np.round((0.03 * curvature + 1) * 127)
    return np.concatenate([code, np.zeros((*frame.size, 1))], axis=-1).astype(np.uint8)
