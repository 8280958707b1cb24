"""Procedural colour in a primitive's own axes: flat, checker, stripes, value noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.scenes.primitives import Array, Point

Pattern = Literal["flat", "checker", "stripes", "noise"]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Texture:
    """Two colours (red, green, blue in [0, 1]) and how they alternate.

    Args:
        pattern: ``flat`` shows ``first`` alone.
        first: First colour.
        second: Second colour.
        period: Size of a cell, or width of a stripe, metres.
        axis: Unit vector that stripes alternate along.
        phase: Where cells begin, in cells; keeps faces off the borders of cells.
        salt: Which noise.
    """

    pattern: Pattern
    first: Colour
    second: Colour = (0.0, 0.0, 0.0)
    period: float = 0.2
    axis: Point = (1.0, 0.0, 0.0)
    phase: Point = (0.0, 0.0, 0.0)
    salt: int = 0

    def colour(self, local: Array) -> Array:
        """Return red, green, blue in [0, 1] (N, 3) at points (N, 3) in the primitive's axes, metres."""
        cells = local / self.period + np.array(self.phase)
        if self.pattern == "flat":
            share = np.zeros(len(local))
        elif self.pattern == "checker":
            share = np.floor(cells).sum(axis=1) % 2
        elif self.pattern == "stripes":
            share = np.floor(cells @ np.array(self.axis)) % 2
        else:
            share = (2 * value_noise(cells, self.salt) + value_noise(2.03 * cells, self.salt + 1)) / 3
        return np.array(self.first) + share[:, None] * (np.array(self.second) - np.array(self.first))


def value_noise(cells: Array, salt: int) -> Array:
    """Return smooth noise in [0, 1) (N,): a hash of the lattice, blended over each unit cell of points (N, 3)."""
    corner = np.floor(cells)
    inside = cells - corner
    weight = inside**2 * (3 - 2 * inside)
    lattice = corner.astype(np.int64)
    value = np.zeros(len(cells))
    for step in np.ndindex(2, 2, 2):
        share = np.prod(np.where(np.array(step) == 1, weight, 1 - weight), axis=1)
        value += share * _hash(lattice + np.array(step), salt)
    return value


def _hash(lattice: np.ndarray, salt: int) -> Array:
    """Return a number in [0, 1) per lattice point (N, 3), by integer mixing modulo 2^32."""
    x, y, z = lattice.T.astype(np.uint64)
    mixed = (x * np.uint64(73856093)) ^ (y * np.uint64(19349663)) ^ (z * np.uint64(83492791)) ^ np.uint64(salt)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        mixed &= np.uint64(0xFFFFFFFF)
        mixed = (mixed ^ (mixed >> np.uint64(16))) * np.uint64(multiplier)
    return ((mixed >> np.uint64(8)) & np.uint64(0xFFFF)) / 65536.0
