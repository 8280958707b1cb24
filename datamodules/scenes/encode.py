"""Codes of the real data sets' files: how metres, unit normals and responses become integers, and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.scenes.cues import HOLE
from datamodules.scenes.primitives import Array


def depth_code(metres: Array, hole: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Return min(65534, round(512 metres)) (H, W), 65535 at holes."""
    code = np.minimum(HOLE - 1, np.round(512 * np.where(hole, 0.0, metres)))
    return np.where(hole, HOLE, code).astype(np.uint16)


def response_code(response: Array) -> NDArray[np.uint16]:
    """Return round(65535 response) (H, W) of a response in [0, 1]; larger ones saturate."""
    return np.round(65535 * np.clip(response, 0, 1)).astype(np.uint16)


def taskonomy_normal_code(normal: Array, hole: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return round(127.5 (n + 1)) of unit normals in camera axes facing the camera (H, W, 3), 128 at holes."""
    code = np.round(127.5 * (np.clip(normal, -1, 1) + 1))
    return np.where(hole[..., None], 128, code).astype(np.uint8)


def opposite_normal_code(normal: Array) -> NDArray[np.uint8]:
    """Return round(127.5 (1 - n)) (H, W, 3): NYUD and PASCAL-Context point normals the other way on all axes."""
    return np.round(127.5 * (1 - np.clip(normal, -1, 1))).astype(np.uint8)


def write_png(path: Path, values: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write 8-bit grey (H, W), 8-bit colour (H, W, 3) or 16-bit grey (H, W) into a PNG of that very mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
