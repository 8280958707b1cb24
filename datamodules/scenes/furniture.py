"""How each kind of furniture looks: shape, size, pattern and colour are tied to the kind, so that it can be learned."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from datamodules.scenes.primitives import Box, Cylinder, Point, Shape, Sphere
from datamodules.scenes.textures import Colour, Pattern, Texture


class Look(NamedTuple):
    """A family of solids of one kind.

    Attributes:
        shape: Primitive.
        low: Smallest width, height, depth in metres; a sphere reads its width, a cylinder width and height.
        high: Largest.
        pattern: Texture.
        first: Mean first colour.
        second: Mean second colour.
        period: Cell size of the texture, metres.
        weight: How often it is drawn, relative to the others of its list.
    """

    shape: Literal["box", "sphere", "cylinder"]
    low: Point
    high: Point
    pattern: Pattern
    first: Colour
    second: Colour
    period: float
    weight: float = 1.0


#: Stands on the floor.
STANDING: dict[str, Look] = {
    "cabinet": Look("box", (0.7, 0.9, 0.4), (1.2, 1.3, 0.6), "stripes", (0.45, 0.27, 0.13), (0.36, 0.2, 0.09), 0.3),
    "bed": Look("box", (1.2, 0.45, 1.7), (1.6, 0.6, 2.0), "checker", (0.25, 0.35, 0.75), (0.85, 0.85, 0.9), 0.25),
    "chair": Look("box", (0.4, 0.75, 0.4), (0.5, 0.95, 0.5), "stripes", (0.9, 0.5, 0.1), (0.7, 0.35, 0.05), 0.08, 2.0),
    "sofa": Look("box", (1.5, 0.65, 0.7), (2.0, 0.8, 0.9), "noise", (0.65, 0.1, 0.12), (0.45, 0.05, 0.08), 0.1, 1.5),
    "table": Look("box", (0.9, 0.6, 0.7), (1.5, 0.75, 0.9), "noise", (0.8, 0.65, 0.4), (0.65, 0.48, 0.25), 0.15, 1.5),
    "bookshelf": Look("box", (0.8, 1.5, 0.3), (1.1, 2.0, 0.4), "checker", (0.2, 0.5, 0.3), (0.75, 0.7, 0.3), 0.12),
    "fridge": Look("box", (0.6, 1.5, 0.6), (0.75, 1.9, 0.7), "flat", (0.88, 0.9, 0.92), (0.0, 0.0, 0.0), 1.0),
    "box": Look("box", (0.3, 0.3, 0.3), (0.6, 0.5, 0.6), "flat", (0.75, 0.58, 0.35), (0.0, 0.0, 0.0), 1.0),
    "rug": Look("box", (1.0, 0.03, 0.8), (1.8, 0.04, 1.4), "checker", (0.6, 0.15, 0.5), (0.85, 0.7, 0.2), 0.2),
    "pillow": Look("sphere", (0.35, 0, 0), (0.5, 0, 0), "flat", (0.9, 0.82, 0.85), (0.0, 0.0, 0.0), 1.0),
    "ball": Look("sphere", (0.25, 0, 0), (0.6, 0, 0), "stripes", (0.9, 0.1, 0.1), (0.95, 0.95, 0.95), 0.08),
    "dog": Look("sphere", (0.4, 0, 0), (0.6, 0, 0), "noise", (0.35, 0.2, 0.1), (0.85, 0.75, 0.6), 0.1),
    "lamp": Look("cylinder", (0.16, 1.2, 0), (0.24, 1.7, 0), "flat", (0.98, 0.9, 0.4), (0.0, 0.0, 0.0), 1.0),
    "bottle": Look("cylinder", (0.2, 0.5, 0), (0.28, 0.7, 0), "stripes", (0.05, 0.4, 0.15), (0.2, 0.75, 0.4), 0.1),
    "plant": Look("cylinder", (0.4, 0.7, 0), (0.6, 1.2, 0), "noise", (0.05, 0.35, 0.05), (0.35, 0.75, 0.2), 0.07),
    "bin": Look("cylinder", (0.3, 0.4, 0), (0.4, 0.6, 0), "flat", (0.3, 0.32, 0.35), (0.0, 0.0, 0.0), 1.0),
    "bag": Look("cylinder", (0.4, 0.35, 0), (0.5, 0.5, 0), "checker", (0.1, 0.1, 0.12), (0.5, 0.45, 0.1), 0.1),
    "pillar": Look("cylinder", (0.3, 9.0, 0), (0.45, 9.0, 0), "noise", (0.7, 0.7, 0.66), (0.5, 0.5, 0.48), 0.12, 0.6),
}
#: Hangs on a wall, as a box whose depth stands out of it.
HANGING: dict[str, Look] = {
    "door": Look("box", (0.8, 1.9, 0.06), (1.0, 2.1, 0.08), "flat", (0.5, 0.33, 0.2), (0.0, 0.0, 0.0), 1.0),
    "picture": Look("box", (0.5, 0.4, 0.04), (1.0, 0.8, 0.06), "noise", (0.1, 0.2, 0.6), (0.95, 0.75, 0.3), 0.12, 1.5),
    "curtain": Look("box", (0.7, 1.6, 0.1), (1.1, 2.0, 0.15), "stripes", (0.55, 0.2, 0.6), (0.4, 0.1, 0.45), 0.08),
    "mirror": Look("box", (0.5, 0.7, 0.04), (0.8, 1.2, 0.06), "flat", (0.7, 0.85, 0.95), (0.0, 0.0, 0.0), 1.0),
    "television": Look(
        "box", (0.9, 0.5, 0.08), (1.3, 0.75, 0.1), "flat", (0.05, 0.05, 0.08), (0.0, 0.0, 0.0), 1.0, 1.5
    ),
}


def draw_kind(looks: dict[str, Look], rng: np.random.Generator) -> str:
    """Return one kind of a list, by weight."""
    weights = np.array([look.weight for look in looks.values()])
    return list(looks)[int(rng.choice(len(looks), p=weights / weights.sum()))]


def draw_size(look: Look, rng: np.random.Generator) -> Point:
    """Return width, height and depth in metres, evenly between the look's bounds."""
    width, height, depth = rng.uniform(look.low, look.high)
    return float(width), float(height), float(depth)


def footprint(look: Look, size: Point) -> float:
    """Return the radius in metres of the circle on the floor that holds the solid whatever its yaw."""
    return float(np.hypot(size[0], size[2]) / 2) if look.shape == "box" else size[0] / 2


def build(look: Look, size: Point, x: float, z: float, yaw: float) -> Shape:
    """Return the primitive standing on the floor (y = 0) at x, z."""
    width, height, depth = size
    if look.shape == "box":
        return Box((x, -height / 2, z), (width / 2, height / 2, depth / 2), yaw)
    if look.shape == "sphere":
        return Sphere((x, -width / 2, z), width / 2)
    return Cylinder((x, -height / 2, z), width / 2, height / 2)


def draw_texture(
    pattern: Pattern, first: Colour, second: Colour, period: float, rng: np.random.Generator, spread: float = 0.08
) -> Texture:
    """Return the texture with each colour moved by up to ``spread`` per channel, and the period by a fifth."""
    axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.6, 0.0, 0.8), (0.0, 0.6, 0.8))
    return Texture(
        pattern,
        _moved(first, spread, rng),
        _moved(second, spread, rng),
        period * float(rng.uniform(0.8, 1.2)),
        axes[int(rng.integers(len(axes)))],
        _point(rng.uniform(0.1, 0.9, 3)),
        int(rng.integers(2**31)),
    )


def _moved(colour: Colour, spread: float, rng: np.random.Generator) -> Colour:
    return _point(np.clip(np.array(colour) + rng.uniform(-spread, spread, 3), 0, 1))


def _point(values: np.ndarray) -> Point:
    x, y, z = values
    return float(x), float(y), float(z)
