"""A pinhole camera, and a random one that looks into a room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.scenes.primitives import Array, Point
from datamodules.scenes.scene import Scene


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with axes x right, y down, z forward.

    Args:
        centre: World position, metres.
        pan: Turn to the right about the vertical, radians.
        tilt: Turn downwards, radians.
        roll: Turn about the viewing direction, radians.
        field_of_view: Angle over the longer side of the image, degrees.
    """

    centre: Point = (0.0, 0.0, 0.0)
    pan: float = 0.0
    tilt: float = 0.0
    roll: float = 0.0
    field_of_view: float = 60.0

    def rotation(self) -> Array:
        """Return the matrix (3, 3) that turns camera axes into world axes."""
        cp, sp = np.cos(self.pan), np.sin(self.pan)
        ct, st = np.cos(self.tilt), np.sin(self.tilt)
        cr, sr = np.cos(self.roll), np.sin(self.roll)
        pan = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
        tilt = np.array([[1, 0, 0], [0, ct, st], [0, -st, ct]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return np.asarray(pan @ tilt @ roll)

    def focal_length(self, size: tuple[int, int]) -> float:
        """Return the focal length in pixels for an image of ``size`` (height, width)."""
        return float(max(size) / 2 / np.tan(np.radians(self.field_of_view) / 2))

    def directions(self, size: tuple[int, int]) -> Array:
        """Return ((u - cx) / f, (v - cy) / f, 1) per pixel (H, W, 3), in camera axes: ray parameters are z-depths."""
        height, width = size
        v, u = np.mgrid[:height, :width].astype(np.float64)
        f = self.focal_length(size)
        return np.stack([(u - (width - 1) / 2) / f, (v - (height - 1) / 2) / f, np.ones(size)], axis=-1)


def draw_camera(scene: Scene, rng: np.random.Generator) -> Camera:
    """Return a camera at eye height that looks across the room, with 50 to 75 degrees field of view.

    Of 60 draws the one is taken that keeps half a metre off everything (or comes nearest to that) and, among those, has
    most of the objects in front of it.
    """
    best, score = Camera(), (-np.inf, -1)
    reach = np.array([scene.size[0], scene.size[2]]) / 2 - 0.3
    for _ in range(60):
        away = rng.uniform(0.6, 1.0) * reach.min()
        around = rng.uniform(-np.pi, np.pi)
        x, z = np.clip(1.4 * away * np.array([np.sin(around), np.cos(around)]), -reach, reach)
        aim = rng.uniform(-0.2, 0.2, 2) * reach
        y, fov, tilt, roll = rng.uniform([-1.7, 50, 0.02, -0.05], [-1.1, 75, 0.35, 0.05])
        pan = np.arctan2(aim[0] - x, aim[1] - z)
        clear, seen = np.inf, 0
        for a, b, radius in scene.occupied:
            clear = min(clear, np.hypot(a - x, b - z) - radius - 0.5)
            off = np.arctan2(a - x, b - z) - pan
            seen += bool(np.cos(off) > np.cos(np.radians(0.45 * fov)))
        if (min(clear, 0.0), seen) > score:
            score = (min(clear, 0.0), seen)
            best = Camera((float(x), float(y), float(z)), float(pan), float(tilt), float(roll), float(fov))
    return best
