"""What rays hit: planes, panels, boxes, spheres, cylinders, capsules, each with its exact normal and curvature.

World axes: x right, y down, z forward, in metres. A direction need not be a unit vector; a ray parameter is in
multiples of its direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Point = tuple[float, float, float]


class Surface(NamedTuple):
    """Where N rays met a primitive: outward unit ``normal`` (N, 3), principal ``curvature`` (N, 2) in 1/m, the larger
    first and convex positive, and the points in the primitive's own axes, ``local`` (N, 3), for textures.
    """

    normal: Array
    curvature: Array
    local: Array


class Shape(Protocol):
    """A primitive that can be hit from outside."""

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the ray parameter of the first hit, inf where there is none.

        Args:
            origin: Camera centre (3,), outside of the primitive.
            directions: Ray directions (..., 3).
        """

    def surface(self, points: Array) -> Surface:
        """Return normal, curvature and local coordinates of points (N, 3) that lie on the primitive."""


def _flat(points: Array) -> Array:
    return np.zeros((len(points), 2))


def _positive(t: Array, hit: NDArray[np.bool_]) -> Array:
    return np.where(hit & (t > 0), t, np.inf)


def _divided(numerator: Array | float, denominator: Array) -> Array:
    # A ray along a face never crosses it: a huge parameter says so without a warning.
    return np.asarray(numerator / np.where(denominator == 0, 1e-30, denominator))


@dataclass(frozen=True)
class Plane:
    """An infinite plane that is seen from the side of its unit ``normal`` only."""

    point: Point
    normal: Point

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the ray parameter, inf for rays that leave the plane."""
        normal = np.array(self.normal)
        slope = directions @ normal
        return _positive(_divided((np.array(self.point) - origin) @ normal, slope), slope < 0)

    def surface(self, points: Array) -> Surface:
        """Return the plane's own normal everywhere; local axes are the world's."""
        return Surface(np.tile(np.array(self.normal), (len(points), 1)), _flat(points), points - np.array(self.point))


@dataclass(frozen=True)
class Panel:
    """A vertical rectangle, ``width`` x ``height`` around ``point``, seen from its horizontal ``normal``'s side."""

    point: Point
    normal: Point
    width: float
    height: float

    def _axes(self) -> Array:
        x, _, z = self.normal
        return np.array([[z, 0.0, -x], [0.0, 1.0, 0.0], [x, 0.0, z]])

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the ray parameter, inf beside the rectangle."""
        t = Plane(self.point, self.normal).distance(origin, directions)
        with np.errstate(invalid="ignore"):  # inf * 0 beside the plane: compares as a miss
            local = (origin - np.array(self.point) + t[..., None] * directions) @ self._axes().T
            inside = (np.abs(local[..., 0]) <= self.width / 2) & (np.abs(local[..., 1]) <= self.height / 2)
        return _positive(t, inside)

    def surface(self, points: Array) -> Surface:
        """Return the rectangle's normal everywhere; local x runs along it, y down."""
        normals = np.tile(np.array(self.normal), (len(points), 1))
        return Surface(normals, _flat(points), (points - np.array(self.point)) @ self._axes().T)


@dataclass(frozen=True)
class Box:
    """A box of half edges ``half`` around ``centre``, turned by ``yaw`` radians about the vertical."""

    centre: Point
    half: Point
    yaw: float = 0.0

    def _axes(self) -> Array:
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return where a ray has entered all three pairs of faces and left none (slab test)."""
        start = self._axes() @ (origin - np.array(self.centre))
        along = directions @ self._axes().T
        near, far = np.full(along.shape[:-1], -np.inf), np.full(along.shape[:-1], np.inf)
        for axis, half in enumerate(self.half):
            one, other = (_divided(side - start[axis], along[..., axis]) for side in (-half, half))
            near, far = np.maximum(near, np.minimum(one, other)), np.minimum(far, np.maximum(one, other))
        return _positive(near, near <= far)

    def surface(self, points: Array) -> Surface:
        """Return the normal of the face that each point is nearest to."""
        axes = self._axes()
        local = (points - np.array(self.centre)) @ axes.T
        face = np.argmax(np.abs(local) / np.array(self.half), axis=1)
        sign = np.sign(local[np.arange(len(local)), face])
        return Surface(sign[:, None] * axes[face], _flat(points), local)


@dataclass(frozen=True)
class Sphere:
    """A sphere; both curvatures are 1/radius."""

    centre: Point
    radius: float

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the nearer root of the quadratic."""
        start = origin - np.array(self.centre)
        return _nearer_root(directions, start, self.radius)

    def surface(self, points: Array) -> Surface:
        """Return the direction from the centre, and 1/radius twice."""
        local = points - np.array(self.centre)
        return Surface(local / self.radius, np.full((len(points), 2), 1 / self.radius), local)


@dataclass(frozen=True)
class Cylinder:
    """A vertical closed cylinder; curvatures are 1/radius, 0 on the side and 0, 0 on the two caps."""

    centre: Point
    radius: float
    half_height: float

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the nearest of side and caps."""
        start = origin - np.array(self.centre)
        side = _nearer_root(directions * [1, 0, 1], start * [1, 0, 1], self.radius)
        with np.errstate(invalid="ignore"):
            height = start[1] + side * directions[..., 1]
        best = _positive(side, np.abs(height) <= self.half_height)
        for cap in (-self.half_height, self.half_height):
            t = _divided(cap - start[1], directions[..., 1])
            x, z = start[0] + t * directions[..., 0], start[2] + t * directions[..., 2]
            best = np.minimum(best, _positive(t, x**2 + z**2 <= self.radius**2))
        return best

    def surface(self, points: Array) -> Surface:
        """Return side or cap values, whichever a point is nearer to."""
        local = points - np.array(self.centre)
        side = np.hypot(local[:, 0], local[:, 2]) / self.radius >= np.abs(local[:, 1]) / self.half_height
        radial = local * [1, 0, 1] / self.radius
        cap = np.sign(local) * [0, 1, 0]
        curvature = np.stack([np.where(side, 1 / self.radius, 0.0), np.zeros(len(points))], axis=1)
        return Surface(np.where(side[:, None], radial, cap), curvature, local)


@dataclass(frozen=True)
class Capsule:
    """All points within ``radius`` of the segment from ``start`` to ``end``: a limb."""

    start: Point
    end: Point
    radius: float

    def distance(self, origin: Array, directions: Array) -> Array:
        """Return the nearest of barrel and two end spheres."""
        start, end = np.array(self.start), np.array(self.end)
        length = np.linalg.norm(end - start)
        axis = (end - start) / length
        offset = origin - start
        across = directions - (directions @ axis)[..., None] * axis
        barrel = _nearer_root(across, offset - (offset @ axis) * axis, self.radius)
        with np.errstate(invalid="ignore"):
            height = offset @ axis + barrel * (directions @ axis)
        best = _positive(barrel, (height >= 0) & (height <= length))
        for centre in (start, end):
            best = np.minimum(best, _nearer_root(directions, origin - centre, self.radius))
        return best

    def surface(self, points: Array) -> Surface:
        """Return the direction from the segment; curvatures: 1/radius, 0 on the barrel, 1/radius twice at the ends."""
        start, end = np.array(self.start), np.array(self.end)
        length = np.linalg.norm(end - start)
        height = (points - start) @ (end - start) / length
        foot = start + (np.clip(height, 0, length) / length)[:, None] * (end - start)
        barrel = (height > 0) & (height < length)
        curvature = np.stack([np.ones(len(points)), np.where(barrel, 0.0, 1.0)], axis=1) / self.radius
        return Surface((points - foot) / self.radius, curvature, points - start)


def _nearer_root(directions: Array, start: Array, radius: float) -> Array:
    """Return the smaller t with norm(start + t direction) = radius, inf where there is none or it lies behind."""
    a = np.sum(directions**2, axis=-1)
    b = directions @ start
    inside_root = b**2 - a * (start @ start - radius**2)
    hit = inside_root >= 0
    return _positive(_divided(-b - np.sqrt(np.where(hit, inside_root, 0.0)), a), hit)
