"""Casting rays: a scene and a camera give a frame, from which every map is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from datamodules.scenes.camera import Camera
from datamodules.scenes.primitives import Array
from datamodules.scenes.scene import Scene
from datamodules.scenes.solid import Solid

#: Square metres over which camera light falls to a half.
FALL_OFF = 8.0


@dataclass(frozen=True)
class Frame:
    """What each pixel's ray met first.

    Args:
        scene: What was rendered.
        camera: From where.
        directions: Rays in camera axes with z = 1 (H, W, 3).
        solid: Index into ``scene.solids`` (H, W), -1 where the ray met nothing.
        depth: Depth along the viewing direction in metres (H, W), inf where the ray met nothing.
        normal: Unit normals in camera axes, facing the camera (H, W, 3); of an open window, those of its pane.
        curvature: Principal curvatures in 1/m (H, W, 2), the larger first, convex positive.
        colour: Surface colour before light, [0, 1] (H, W, 3).
    """

    scene: Scene
    camera: Camera
    directions: Array
    solid: NDArray[np.int64]
    depth: Array
    normal: Array
    curvature: Array
    colour: Array

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.solid.shape[0], self.solid.shape[1]

    @cached_property
    def hole(self) -> NDArray[np.bool_]:
        """Where there is no surface (H, W): open windows, and rays that met nothing."""
        return (self.solid < 0) | (self.table([s.open for s in self.scene.solids]) > 0)

    @cached_property
    def distance(self) -> Array:
        """Euclidean distance from the camera in metres (H, W)."""
        return self.depth * np.linalg.norm(self.directions, axis=-1)

    @cached_property
    def cosine(self) -> Array:
        """Cosine between the normal and the direction to the camera (H, W)."""
        towards = -self.directions / np.linalg.norm(self.directions, axis=-1, keepdims=True)
        return np.clip(np.sum(self.normal * towards, axis=-1), 0, 1)

    def table(self, values: list[int] | list[bool]) -> NDArray[np.int64]:
        """Return per pixel the entry of its solid in ``values``, one per solid; 0 where the ray met nothing (H, W)."""
        return np.array([*values, 0], dtype=np.int64)[self.solid]

    @cached_property
    def instance(self) -> NDArray[np.int64]:
        """Number of the object in each pixel (H, W), -1 where the ray met nothing."""
        return np.where(self.solid < 0, -1, self.table([s.instance for s in self.scene.solids]))

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """Red, green, blue (H, W, 3): colour under ambient, directional and camera light; sky through windows."""
        light = self.scene.light
        towards = np.array(light.direction) @ self.camera.rotation()
        with np.errstate(invalid="ignore"):
            near = np.where(self.hole, 0.0, FALL_OFF / (FALL_OFF + self.distance**2))
        strength = (
            light.ambient + light.directional * np.clip(self.normal @ towards, 0, 1) + light.camera * self.cosine * near
        )
        lit = self.colour * np.where(self.hole, 1.0, strength)[..., None]
        return np.round(255 * np.clip(lit, 0, 1)).astype(np.uint8)


def cast(scene: Scene, camera: Camera, size: tuple[int, int]) -> Frame:
    """Return the frame of ``size`` (height, width) that ``camera`` sees of ``scene``."""
    directions = camera.directions(size)
    rotation = camera.rotation()
    origin = np.array(camera.centre)
    world = directions @ rotation.T
    depth = np.full(size, np.inf)
    solid = np.full(size, -1)
    for number, one in enumerate(scene.solids):
        t = one.shape.distance(origin, world)
        nearer = t < depth
        depth[nearer] = t[nearer]
        solid[nearer] = number
    normal, colour, curvature = np.zeros((*size, 3)), np.zeros((*size, 3)), np.zeros((*size, 2))
    for number, one in enumerate(scene.solids):
        seen = solid == number
        if seen.any():
            _paint(one, seen, origin + depth[seen][:, None] * world[seen], normal, colour, curvature)
    return Frame(scene, camera, directions, solid, depth, normal @ rotation, curvature, colour)


def _paint(one: Solid, seen: NDArray[np.bool_], points: Array, normal: Array, colour: Array, curvature: Array) -> None:
    surface = one.shape.surface(points)
    normal[seen], curvature[seen] = surface.normal, surface.curvature
    colour[seen] = one.texture.colour(surface.local)
