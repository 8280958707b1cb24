"""A random room: six planes, what hangs on the walls, what stands on the floor, people, light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.scenes.furniture import (
    HANGING,
    STANDING,
    build,
    draw_kind,
    draw_size,
    draw_texture,
    footprint,
)
from datamodules.scenes.people import FOOTPRINT, draw_person
from datamodules.scenes.primitives import Box, Panel, Plane, Point
from datamodules.scenes.solid import Solid
from datamodules.scenes.textures import Texture

#: Inward normals of the four walls; the number of a wall is its place here.
WALLS: tuple[Point, ...] = ((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Light:
    """Shares of ambient, directional and camera light, and where the directional light comes from (unit vector)."""

    ambient: float = 0.45
    directional: float = 0.35
    camera: float = 0.45
    direction: Point = (0.0, -1.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A room in world axes (x right, y down, z forward; the floor is y = 0, the middle of the room x = z = 0).

    Args:
        solids: Everything that can be hit.
        size: Width (x), height and depth (z) of the room, metres.
        occupied: Circles on the floor (x, z, radius) that a camera must keep out of.
        light: Illumination.
    """

    solids: tuple[Solid, ...]
    size: Point
    occupied: tuple[Point, ...] = ()
    light: Light = Light()


def draw_scene(rng: np.random.Generator, people: int | None = None) -> Scene:
    """Return a random furnished room.

    Args:
        rng: Where all randomness comes from.
        people: Number of people; None draws 0 to 2.
    """
    width, depth = (float(v) for v in rng.uniform(4.2, 7.0, 2))
    height = float(rng.uniform(2.4, 3.2))
    solids = _room(width, height, depth, rng)
    solids += _hanging((width, height, depth), len(solids), rng)
    if people is None:
        people = int(rng.choice(3, p=[0.35, 0.4, 0.25]))
    occupied: list[Point] = []
    for _ in range(people):
        place = _free_place(FOOTPRINT, (width, depth), occupied, rng)
        if place is not None:
            solids += draw_person(*place, instance=_next(solids), rng=rng)
            occupied.append((*place, FOOTPRINT))
    for _ in range(int(rng.integers(3, 9))):
        kind = draw_kind(STANDING, rng)
        look = STANDING[kind]
        size = draw_size(look, rng)
        size = (size[0], min(size[1], height), size[2])
        place = _free_place(footprint(look, size), (width, depth), occupied, rng)
        if place is None:
            continue
        shape = build(look, size, *place, yaw=float(rng.uniform(-np.pi, np.pi)))
        texture = draw_texture(look.pattern, look.first, look.second, look.period, rng)
        solids.append(Solid(shape, texture, kind, _next(solids)))
        occupied.append((*place, footprint(look, size)))
    return Scene(tuple(solids), (width, height, depth), tuple(occupied), _light(rng))


def _next(solids: list[Solid]) -> int:
    return max(solid.instance for solid in solids) + 1


def _light(rng: np.random.Generator) -> Light:
    angle = rng.uniform(-np.pi, np.pi)
    # From above, at least 45 degrees off the horizon.
    direction = np.array([0.6 * np.cos(angle), -1.0, 0.6 * np.sin(angle)])
    x, y, z = direction / np.linalg.norm(direction)
    ambient, directional, camera = rng.uniform([0.35, 0.2, 0.3], [0.55, 0.45, 0.6])
    return Light(float(ambient), float(directional), float(camera), (float(x), float(y), float(z)))


def _room(width: float, height: float, depth: float, rng: np.random.Generator) -> list[Solid]:
    floor = (
        draw_texture("checker", (0.55, 0.5, 0.42), (0.42, 0.38, 0.32), 0.5, rng),
        draw_texture("stripes", (0.6, 0.42, 0.25), (0.5, 0.34, 0.2), 0.15, rng),
        draw_texture("noise", (0.5, 0.45, 0.4), (0.4, 0.36, 0.34), 0.2, rng),
    )[int(rng.integers(3))]
    hue = rng.uniform(0.6, 0.9, 3)
    tint = (float(hue[0]), float(hue[1]), float(hue[2]))
    darker = (0.85 * tint[0], 0.85 * tint[1], 0.85 * tint[2])
    wall = (
        draw_texture("flat", tint, tint, 1.0, rng),
        draw_texture("stripes", tint, darker, 0.25, rng, spread=0.02),
        draw_texture("noise", tint, darker, 0.5, rng, spread=0.02),
    )[int(rng.integers(3))]
    ceiling = draw_texture("flat", (0.93, 0.93, 0.9), (0, 0, 0), 1.0, rng, spread=0.05)
    solids = [
        Solid(Plane((0.0, 0.0, 0.0), (0.0, -1.0, 0.0)), floor, "floor", 0),
        Solid(Plane((0.0, -height, 0.0), (0.0, 1.0, 0.0)), ceiling, "ceiling", 1),
    ]
    for number, (x, _, z) in enumerate(WALLS):
        plane = Plane((-x * width / 2, 0.0, -z * depth / 2), (x, 0.0, z))
        solids.append(Solid(plane, wall, "wall", 2 + number))
    return solids


def _hanging(room: Point, first: int, rng: np.random.Generator) -> list[Solid]:
    """Return up to four solids on the walls, none above another; half of the rooms have a window among them."""
    solids: list[Solid] = []
    taken: list[tuple[int, float, float]] = []
    kinds = ["window"] * int(rng.random() < 0.5)
    kinds += [draw_kind(HANGING, rng) for _ in range(int(rng.integers(0, 4)))]
    for kind in kinds:
        wall = int(rng.integers(4))
        length = room[2] if WALLS[wall][0] else room[0]
        width, height, depth = (
            (float(rng.uniform(1.0, 1.6)), float(rng.uniform(0.9, 1.3)), 0.0)
            if kind == "window"
            else draw_size(HANGING[kind], rng)
        )
        along = float(rng.uniform(-1, 1) * (length / 2 - width / 2 - 0.15))
        if any(w == wall and abs(along - a) < (width + other) / 2 + 0.1 for w, a, other in taken):
            continue
        taken.append((wall, along, width))
        above = 0.0 if kind == "door" else 0.15 if height >= 1.4 else float(rng.uniform(0.5, 0.9))
        y = height / 2 - min(room[1] - 0.05, above + height)
        x, _, z = WALLS[wall]
        # A millimetre off the wall, so that the panel wins over it.
        off = max(depth / 2, 0.001)
        centre = (-x * (room[0] / 2 - off) + abs(z) * along, y, -z * (room[2] / 2 - off) + abs(x) * along)
        if kind == "window":
            sky = Texture("flat", (0.75, 0.87, 1.0))
            solids.append(Solid(Panel(centre, WALLS[wall], width, height), sky, kind, first + len(solids), open=True))
            continue
        look = HANGING[kind]
        texture = draw_texture(look.pattern, look.first, look.second, look.period, rng)
        half = (width / 2, height / 2, depth / 2) if z else (depth / 2, height / 2, width / 2)
        solids.append(Solid(Box(centre, half), texture, kind, first + len(solids)))
    return solids


def _free_place(
    radius: float, room: tuple[float, float], occupied: list[Point], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Return x, z of a circle that touches neither walls nor others, None if 40 tries find none."""
    reach = np.array(room) / 2 - radius - 0.05
    for _ in range(40):
        x, z = (float(v) for v in rng.uniform(-reach, reach))
        if all(np.hypot(x - a, z - b) > radius + r for a, b, r in occupied):
            return x, z
    return None
