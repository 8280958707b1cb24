"""One numbered view of one data set: the same bytes whatever else is rendered, by how many processes, in what order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.scenes import GENERATOR_VERSION
from datamodules.scenes.camera import draw_camera
from datamodules.scenes.render import Frame, cast
from datamodules.scenes.scene import Scene, draw_scene


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Return the generator of a scene or view, from generator version, seed and its numbers alone."""
    return np.random.default_rng([GENERATOR_VERSION, seed, *numbers])


def draw_view(scene: Scene, size: tuple[int, int], rng: np.random.Generator) -> Frame:
    """Return a frame of ``size`` (height, width) from a random camera in ``scene``."""
    return cast(scene, draw_camera(scene, rng), size)


def draw_frame(numbers: Sequence[int], seed: int, size: tuple[int, int] | None, people: int | None = None) -> Frame:
    """Return the only view of a scene.

    Args:
        numbers: Which scene: number of the data set, number in it.
        seed: Which set of scenes.
        size: Height and width; None draws a longer side of 128 and a shorter of 80 to 128, upright in a third.
        people: Number of people; None draws 0 to 2.
    """
    rng = generator(seed, *numbers)
    if size is None:
        shorter = int(rng.integers(80, 129))
        size = (128, shorter) if rng.random() < 1 / 3 else (shorter, 128)
    return draw_view(draw_scene(rng, people), size, rng)
