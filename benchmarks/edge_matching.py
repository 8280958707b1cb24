"""What ods-F costs: matching by maximum flow against pyEdgeEval's matcher, and what one image takes.

A random scene of overlapping shapes gives the boundary; the edge map is that boundary bent, blurred, of uneven strength
and joined by false edges. Both matchers get the same thinned maps, threshold by threshold, in turn. pyEdgeEval 0.2.8
(the original C++ program of the Berkeley benchmark) is asked only if it can be imported:
``pip install pyEdgeEval==0.2.8`` builds it from source.

    python benchmarks/edge_matching.py
    python benchmarks/edge_matching.py --height 128 --width 160
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.morphology import thin as skimage_thin

from tasks.edge_matching.counting import count_image
from tasks.edge_matching.matching import matched_pairs
from tasks.edge_matching.protocol import Protocol
from tasks.edge_matching.suppression import suppress
from tasks.edge_matching.thinning import thin

Mask = NDArray[np.bool_]
Map = NDArray[np.float64]


def scene(height: int, width: int, seed: int) -> tuple[NDArray[np.uint8], Mask]:
    """Return an edge map in 8 bit and the boundary, both (H, W)."""
    rng = np.random.default_rng(seed)
    boundary, false = (thin(region_boundaries(regions(height, width, shapes, rng))) for shapes in (38, 12))
    scale = np.hypot(height, width) / 703  # 1 at 425 x 560
    bend = [1.8 * scale * field(rng, height, width, 15) for _ in range(2)]
    places = np.mgrid[:height, :width] + np.stack(bend)
    strength = boundary * (0.6 + 0.25 * field(rng, height, width, 25)) + false * 0.3
    bent = map_coordinates(gaussian_filter(strength.clip(0), 1.5), places, order=1, mode="nearest") * 3.5
    noise = 0.04 * np.abs(gaussian_filter(rng.normal(size=(height, width)), 1)) * 2
    return np.floor(255 * (bent + noise).clip(0, 1)).astype(np.uint8), boundary


def regions(height: int, width: int, shapes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a label map of ``shapes`` boxes and ellipses, the later above the earlier."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int64)
    for label in range(1, shapes + 1):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(0.04, 0.25, 2) * height
        dy, dx = (y - cy) / ry, (x - cx) / rx
        inside = dy**2 + dx**2 < 1 if label % 2 else np.maximum(abs(dy), abs(dx)) < 1
        labels[inside] = label
    return labels


def region_boundaries(labels: NDArray[np.int64]) -> Mask:
    """Return where a pixel differs from its east, south or south-east neighbour."""
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    return (labels != padded[:-1, 1:]) | (labels != padded[1:, :-1]) | (labels != padded[1:, 1:])


def field(rng: np.random.Generator, height: int, width: int, sigma: float) -> Map:
    """Return a smooth random field of deviation 1."""
    values = gaussian_filter(rng.normal(size=(height, width)), sigma)
    return values / values.std()


def original_matcher() -> Callable[[Mask, Mask, float], int] | None:
    """Return pyEdgeEval's matcher as a function of two maps and the share of the diagonal; None if it is not there."""
    try:
        from pyEdgeEval._lib import correspond_pixels
    except ImportError:
        return None

    def matched(first: Mask, second: Mask, max_dist: float) -> int:
        found: Any = correspond_pixels(first.astype(np.uint8), second.astype(np.uint8), max_dist=max_dist)
        return int(np.count_nonzero(found[0]))

    return matched


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(
    height: int = 425,
    width: int = 560,
    max_dists: Sequence[float] = (0.0075, 0.011),
    thresholds: Sequence[float] = (0.05, 0.15, 0.3, 0.5, 0.7),
    repeats: int = 3,
    seed: int = 0,
) -> None:
    """Measure suppression, thinning, matching, and whole images.

    Args:
        height: Of the image.
        width: Of the image.
        max_dists: Matching distances as shares of the diagonal.
        thresholds: At which matchers are compared.
        repeats: Rounds; each runs everything once, in turn, and medians are printed.
        seed: Of the scene.
    """
    console, original = Console(), original_matcher()
    levels, boundary = scene(height, width, seed)
    strength = suppress(levels / 255)
    maps = {t: thin(strength > t) for t in thresholds}
    console.print(f"{height} x {width}, {np.count_nonzero(boundary)} boundary pixels, seed {seed}")
    if original is None:
        console.print("pyEdgeEval is not installed: pip install pyEdgeEval==0.2.8")

    table = Table(title="matching, seconds per threshold")
    for name in ("max_dist", "threshold", "pixels", "pairs, flow", "pairs, original", "flow", "original", "ratio"):
        table.add_column(name, justify="right")
    ratios = []
    for max_dist in max_dists:
        radius = Protocol.of(max_dist).radius((height, width))
        for threshold, found in maps.items():
            ours = matched_pairs(found, boundary, radius)
            theirs = original(found, boundary, max_dist) if original else None
            times: dict[str, list[float]] = {"flow": [], "original": []}
            for _ in range(repeats):
                times["flow"].append(seconds(lambda f=found, r=radius: matched_pairs(f, boundary, r)))
                if original:
                    times["original"].append(seconds(lambda f=found, d=max_dist: original(f, boundary, d)))
            flow = statistics.median(times["flow"])
            cells = [f"{max_dist}", f"{threshold}", f"{np.count_nonzero(found)}", f"{ours}"]
            if original:
                old = statistics.median(times["original"])
                ratios.append(old / flow)
                cells += [f"{theirs}", f"{flow:.4f}", f"{old:.3f}", f"{old / flow:.0f}"]
            else:
                cells += ["", f"{flow:.4f}", "", ""]
            table.add_row(*cells)
    console.print(table)
    if ratios:
        console.print(f"original / flow: lowest {min(ratios):.0f}, median {statistics.median(ratios):.0f}")

    mask = strength > min(thresholds)
    steps: dict[str, Callable[[], object]] = {
        "suppression": lambda: suppress(levels / 255),
        f"thinning above {min(thresholds)}": lambda: thin(mask),
        f"thinning above {min(thresholds)}, scikit-image": lambda: skimage_thin(mask),
    }
    for number in (101, 19):
        protocol = Protocol.of(max_dists[0], number)
        steps[f"whole image, {number} thresholds"] = lambda p=protocol: count_image(levels, boundary, p)
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            measured[name].append(seconds(step))
    table = Table(title=f"one image, one process, max_dist {max_dists[0]}")
    for name in ("step", "seconds"):
        table.add_column(name)
    for name, values in measured.items():
        table.add_row(name, f"{statistics.median(values):.4f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
