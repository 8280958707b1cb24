"""Taskonomy's domains: which file holds a task's label, and how its pixels become the target that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from datamodules.dense.files import Pixels, Size, read_image

Array = NDArray[np.float32]

#: What a depth file holds where the scan has a hole.
HOLE = 65535


def resize(image: Image.Image, size: Size) -> Array:
    """Return float32 (C, H, W) of an image, bilinear; 16 bit are resized as real numbers, 8 bit as 8 bit."""
    if image.mode not in ("RGB", "L"):
        image = Image.fromarray(np.asarray(image).astype(np.float32))
    if (image.height, image.width) != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array: Array = np.array(image, dtype=np.float32)
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def validity(depth: Image.Image, size: Size) -> Array:
    """Return float32 (1, H, W): 1 where no hole of the depth file went into the resized pixel, else 0."""
    holes = Image.fromarray((np.asarray(depth) == HOLE).astype(np.float32))
    return (resize(holes, size) == 0).astype(np.float32)


def log_depth(v: Array) -> Array:
    """Return log(1 + v) / log 65536, in [0, 1]; a hole is 1."""
    scaled: Array = np.log1p(v) / np.float32(np.log(65536.0))
    return scaled


def stretched(v: Array, top: float) -> Array:
    """Return 2 min(v, top) / top - 1, in [-1, 1]."""
    scaled: Array = 2 * np.minimum(v, np.float32(top)) / np.float32(top) - 1
    return scaled


def occlusion(v: Array) -> Array:
    """Return 2 v / 409.6 - 1, not clipped, smoothed by a Gaussian of 4 pixels."""
    return np.stack([gaussian_filter(2 * channel / np.float32(409.6) - 1, sigma=4) for channel in v])


def curvature(v: Array) -> Array:
    """Return both curvatures, (2, H, W), about the mean and over the deviation of the training set."""
    mean, deviation = np.array([123.572, 120.1], np.float32), np.array([31.922, 21.658], np.float32)
    return (v[:2] - mean[:, None, None]) / deviation[:, None, None]


@dataclass(frozen=True)
class Domain:
    """One kind of label.

    Args:
        name: Of the folder, and in every file name.
        pixels: What its files hold.
        scale: Makes the target of resized pixels, float32 (C, H, W).
        masked: The target has a second channel that says where depth is known.
        directed: The first channel points along x, so that mirroring changes its sign.
    """

    name: str
    pixels: Pixels
    scale: Callable[[Array], Array]
    masked: bool = False
    directed: bool = False


_bytes = partial(stretched, top=255)
#: The folder of the images.
RGB = "rgb"
#: Label domains by task.
DOMAINS: dict[str, Domain] = {
    "de": Domain("depth_euclidean", Pixels.GREY16, log_depth, masked=True),
    "dz": Domain("depth_zbuffer", Pixels.GREY16, log_depth, masked=True),
    "eo": Domain("edge_occlusion", Pixels.GREY16, occlusion),
    "et": Domain("edge_texture", Pixels.GREY16, partial(stretched, top=0.08 * 65536)),
    "k2": Domain("keypoints2d", Pixels.GREY16, partial(stretched, top=0.005 * 65536)),
    "k3": Domain("keypoints3d", Pixels.GREY16, partial(stretched, top=65536)),
    "n": Domain("normal", Pixels.RGB, _bytes, directed=True),
    "c": Domain("principal_curvature", Pixels.RGB, curvature),
    "r": Domain("reshading", Pixels.RGB, _bytes),
    "s2": Domain("segment_unsup2d", Pixels.GREY, _bytes),
    "s25": Domain("segment_unsup25d", Pixels.GREY, _bytes),
}


def read_target(domain: Domain, file: Callable[[str], Path], original: Size, size: Size) -> Array:
    """Return the target of one view, float32 (C, H, W).

    Args:
        domain: Which label.
        file: Gives the view's file in a domain.
        original: (H, W) of the view's image, which the label must have too.
        size: (H, W) of the target.
    """
    image = read_image(file(domain.name), domain.pixels, original)
    target = domain.scale(resize(image, size))
    if domain.masked:
        zbuffer = DOMAINS["dz"]
        depth = image if domain is zbuffer else read_image(file(zbuffer.name), zbuffer.pixels, original)
        target = np.concatenate([target, validity(depth, size)])
    return target


def flip(target: Array, negate_x: bool) -> Array:
    """Return a target mirrored left to right, its first channel with the opposite sign if ``negate_x``."""
    mirrored: NDArray[Any] = target[..., ::-1].copy()
    if negate_x:
        mirrored[0] *= -1
    return mirrored
