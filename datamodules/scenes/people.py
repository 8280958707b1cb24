"""A person: sphere head, box torso, capsule limbs, each solid with the name of its part."""

from __future__ import annotations

import numpy as np

from datamodules.scenes.furniture import draw_texture
from datamodules.scenes.primitives import Array, Box, Capsule, Point, Sphere
from datamodules.scenes.solid import Solid

#: Radius in metres of the circle on the floor that a person needs.
FOOTPRINT = 0.4


def draw_person(x: float, z: float, instance: int, rng: np.random.Generator) -> list[Solid]:
    """Return the ten solids of a person of 1.5 to 1.85 m standing at x, z: random pose, direction and clothes."""
    scale = float(rng.uniform(1.5, 1.85)) / 1.7
    yaw = float(rng.uniform(-np.pi, np.pi))
    skin = draw_texture("flat", (0.85, 0.62, 0.48), (0, 0, 0), 1.0, rng)
    shirt = draw_texture("stripes", (0.15, 0.6, 0.75), (0.9, 0.9, 0.85), 0.12, rng, spread=0.15)
    trousers = draw_texture("flat", (0.15, 0.15, 0.3), (0, 0, 0), 1.0, rng)

    def place(point: Array) -> Point:
        # The person's own axes: x to its left, y down from the floor, z to its front; same turn as Box.
        cos, sin = np.cos(yaw), np.sin(yaw)
        px, py, pz = scale * point
        return float(x + cos * px - sin * pz), float(py), float(z + sin * px + cos * pz)

    def limb(part: str, start: Array, end: Array, radius: float) -> Solid:
        texture = skin if part.endswith("larm") else shirt if part.endswith("arm") else trousers
        return Solid(Capsule(place(start), place(end), scale * radius), texture, "person", instance, part)

    half = (scale * 0.2, scale * 0.29, scale * 0.12)
    solids = [
        Solid(Sphere(place(np.array([0, -1.55, 0])), scale * 0.14), skin, "person", instance, "head"),
        Solid(Box(place(np.array([0, -1.12, 0])), half, yaw), shirt, "person", instance, "torso"),
    ]
    for side, sign in (("l", 1.0), ("r", -1.0)):
        shoulder = np.array([sign * 0.26, -1.34, 0.0])
        swing, out, bend = rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.6), rng.uniform(0.0, 1.2)
        elbow = shoulder + 0.3 * _down(swing, sign * out)
        hand = elbow + 0.3 * _down(swing + bend, sign * out)
        solids += [limb(f"{side}uarm", shoulder, elbow, 0.065), limb(f"{side}larm", elbow, hand, 0.055)]
        hip = np.array([sign * 0.11, -0.84, 0.0])
        stride = rng.uniform(-0.35, 0.35)
        knee = hip + 0.38 * _down(stride, sign * 0.05)
        foot = np.array([knee[0], -0.07, knee[2] - rng.uniform(0.0, 0.1)])
        solids += [limb(f"{side}uleg", hip, knee, 0.09), limb(f"{side}lleg", knee, foot, 0.07)]
    return solids


def _down(swing: float, out: float) -> Array:
    """Return the unit direction of a limb: straight down, swung to the front and spread to the side (radians)."""
    return np.array([np.sin(out), np.cos(out) * np.cos(swing), np.cos(out) * np.sin(swing)])
