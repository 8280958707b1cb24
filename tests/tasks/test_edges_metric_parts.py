"""Suppression, thinning and matching against slow oracles."""

import ast
import math
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree
from skimage.morphology import thin as skimage_thin

from tasks.edge_matching.matching import matched_pairs, pairs_within
from tasks.edge_matching.protocol import Protocol
from tasks.edge_matching.suppression import orientation, suppress
from tasks.edge_matching.thinning import thin
from tests.fakes.edge_maps import ridges


def slow_suppress(E):
    """``edgesNmsMex`` pixel by pixel."""
    height, width = E.shape
    angle, out = orientation(E), E.copy()

    def at(y, x):
        x, y = min(max(x, 0), width - 1.001), min(max(y, 0), height - 1.001)
        x0, y0 = int(x), int(y)
        u, v = x - x0, y - y0
        top = E[y0, x0] * (1 - u) + E[y0, x0 + 1] * u
        return top * (1 - v) + (E[y0 + 1, x0] * (1 - u) + E[y0 + 1, x0 + 1] * u) * v

    for y in range(height):
        for x in range(width):
            for d in (-1, 1):
                if E[y, x] and 1.01 * E[y, x] < at(y + d * math.sin(angle[y, x]), x + d * math.cos(angle[y, x])):
                    out[y, x] = 0
    for y in range(height):
        for x in range(width):
            for distance in (x, width - 1 - x, y, height - 1 - y):
                out[y, x] *= min(distance, 5) / 5
    return out


def slow_orientation(E):
    """Smoothing by an explicit sum over a mirrored border, differences by hand."""
    kernel = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    padded = np.pad(E, 4, mode="symmetric")
    height, width = E.shape
    smooth = sum(
        kernel[i] * kernel[j] / 625 * padded[i : i + height, j : j + width] for i in range(9) for j in range(9)
    )

    def difference(image, axis):
        image = np.moveaxis(image, axis, 0)
        out = np.empty_like(image)
        out[1:-1] = (image[2:] - image[:-2]) / 2
        out[0], out[-1] = image[1] - image[0], image[-1] - image[-2]
        return np.moveaxis(out, 0, axis)

    dx, dy = difference(smooth, 1), difference(smooth, 0)
    dxx, dxy, dyy = difference(dx, 1), difference(dy, 1), difference(dy, 0)
    return np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)) % np.pi


def test_suppression_equals_the_slow_form():
    rng = np.random.default_rng(0)
    for _ in range(3):
        # A little noise: where a difference is 0 up to rounding, its sign is anyone's.
        E = ridges(rng) + 0.01 * rng.random((24, 31))
        np.testing.assert_allclose(orientation(E), slow_orientation(E), atol=1e-9)
        np.testing.assert_allclose(suppress(E), slow_suppress(E), atol=1e-12)
        assert 0 < np.count_nonzero(suppress(E)) < 0.5 * np.count_nonzero(E)


def test_suppression_keeps_the_crest_of_a_slanted_ridge():
    y, x = np.mgrid[:40, :40]
    distance = (x - y + 3) / math.sqrt(2)
    kept = suppress(np.floor(255 * np.exp(-(distance**2) / 8)) / 255)
    inside = kept[6:-6, 6:-6] > 0
    assert np.array_equal(inside, np.abs(distance[6:-6, 6:-6]) < 0.1)


def test_small_maps_are_no_trouble():
    for shape in ((1, 1), (1, 7), (2, 2), (5, 2)):
        assert suppress(np.full(shape, 0.5)).shape == shape


def test_thinning_equals_skimage():
    rng = np.random.default_rng(1)
    masks = [rng.random((30, 41)) < p for p in (0.02, 0.2, 0.5, 0.8, 0.97)]
    masks += [ridges(rng) > t for t in (0.2, 0.5, 0.8)]
    masks += [np.zeros((4, 5), bool), np.ones((17, 9), bool), np.ones((1, 6), bool), np.zeros((3, 0), bool)]
    for mask in masks:
        before = mask.copy()
        assert np.array_equal(thin(mask), skimage_thin(mask) if mask.size else mask)
        assert np.array_equal(mask, before)


@pytest.mark.parametrize("radius", [0.5, 1, math.sqrt(5), 5.3, 7.7])
def test_pairs_equal_those_of_a_tree(radius):
    rng = np.random.default_rng(2)
    first, second = rng.random((25, 19)) < 0.1, rng.random((25, 19)) < 0.15
    starts, neighbours = pairs_within(first, second, radius)
    got = [neighbours[a:b].tolist() for a, b in pairwise(starts)]
    tree = cKDTree(np.argwhere(second))
    assert got == [sorted(found) for found in tree.query_ball_point(np.argwhere(first), radius + 1e-9)]


def exhaustive(first, second, radius):
    """Try every way to match."""
    a, b = np.argwhere(first), np.argwhere(second)
    near = [[j for j in range(len(b)) if ((p - b[j]) ** 2).sum() <= radius**2] for p in a]

    @cache
    def best(i, used):
        if i == len(a):
            return 0
        free = (1 + best(i + 1, used | 1 << j) for j in near[i] if not used >> j & 1)
        return max([best(i + 1, used), *free])

    return best(0, 0)


def test_matching_equals_an_exhaustive_search():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(25):
        maps = []
        for _ in range(2):
            mask = np.zeros(64, bool)
            mask[rng.choice(64, 12, replace=False)] = True
            maps.append(mask.reshape(8, 8))
        radius = rng.choice([1, 1.5, 2, 3])
        assert matched_pairs(*maps, radius) == exhaustive(*maps, radius) == matched_pairs(*maps[::-1], radius)
        found.append(matched_pairs(*maps, radius))
    assert min(found) < 6
    assert max(found) == 12


def test_worker_processes_need_no_torch():
    folder = Path(__file__).parents[2] / "tasks" / "edge_matching"
    allowed = {*sys.stdlib_module_names, "numpy", "scipy"}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                ours = name == "nscmerge.errors" or name.startswith("tasks.edge_matching")
                assert ours or name.partition(".")[0] in allowed, f"{file.name} imports {name}"


def test_fewer_pixels_at_higher_thresholds_before_thinning():
    rng = np.random.default_rng(4)
    strength = suppress(ridges(rng, (60, 80)))
    sizes = [np.count_nonzero(strength > t) for t in Protocol.of(0.01).thresholds]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[50] > 0
