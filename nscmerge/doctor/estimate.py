"""What each closed-form method would cost on these adapters: memory, time and disk, from shapes. An estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nscmerge.adapters import Adapter
from nscmerge.methods import METHODS


@dataclass(frozen=True)
class Speed:
    """How fast this machine is; constants where nobody measured.

    Args:
        product: Flops per second of B @ A in fp32 at rank 16, which is bound by writing the product.
        entries: Entries per second of one elementwise pass over fp32 numbers.
        qr: Flops per second of a tall fp64 QR decomposition.
        disk: Bytes per second of reading and checking an input, or of writing, reading back and hashing an output.
    """

    product: float = 1.5e10
    entries: float = 5e8
    qr: float = 2e10
    disk: float = 2e8

    @classmethod
    def measure(cls) -> Speed:
        """Return the speed of this machine: the best of three short runs of each kind, 0.3 s in all.

        The dense ones are as large as a layer of a 7B model, 64 MB: what fits into a cache is ten times as fast.
        """
        A, B = torch.ones(16, 4096), torch.ones(4096, 16)
        dense = B @ A
        tall = torch.eye(2048, 64, dtype=torch.float64)
        return cls(
            product=2 * 16 * 4096**2 / _best(lambda: B @ A),
            entries=4096**2 / _best(lambda: dense.abs()),
            qr=_qr_flops(2048, 64) / _best(lambda: torch.linalg.qr(tall)),
        )


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs after a first one that warms up."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)


@dataclass(frozen=True)
class Shape:
    """One layer of a merge: its widths and the rank in every adapter that has it."""

    d_out: int
    d_in: int
    ranks: tuple[int, ...]

    @property
    def width(self) -> int:
        """d_in + d_out: floats of one unit of rank."""
        return self.d_in + self.d_out

    @property
    def size(self) -> int:
        """d_in x d_out: floats of one dense delta."""
        return self.d_in * self.d_out

    @property
    def total(self) -> int:
        """R, the sum of ranks."""
        return sum(self.ranks)


@dataclass(frozen=True)
class Work:
    """What one layer costs.

    Args:
        rank: Rank of the merged factors, None where the result is dense.
        output: Floats (fp32) that are written.
        working: Floats (fp32) in memory while this layer is merged, beside the adapters.
        kept: Floats (fp32) in memory from then on until all is written.
        qr: Flops in fp64 decompositions.
        product: Flops in products B @ A.
        entries: Entries touched by elementwise passes.
    """

    rank: int | None
    output: int
    working: int
    kept: int = 0
    qr: float = 0.0
    product: float = 0.0
    entries: float = 0.0


def _qr_flops(d: int, r: int) -> float:
    """Householder QR of (d, r) with the thin Q formed."""
    return 4.0 * d * r * r


def _factors(shape: Shape, rank: int, qr: float = 0.0, passes: float = 2.0) -> Work:
    """Work of a method whose result has ``rank``.

    Working memory: the stacked factors, Q and workspace in fp64; the result stays, and so does the copy of it that is
    written. ``passes`` are elementwise, over all stacked factors.
    """
    output, stacked = rank * shape.width, shape.total * shape.width
    # The receipt states the numerical rank of what is written: one more decomposition, at the output's rank.
    receipt = _core_svd(shape, rank)
    return Work(rank, output, 6 * stacked, 2 * output, qr + receipt, 0.0, passes * stacked)


def _core_svd(shape: Shape, rank: int) -> float:
    """QR of both stacks, SVD of the core, singular vectors back to full width."""
    return _qr_flops(shape.width, rank) + 25.0 * rank**3 + 2.0 * shape.width * rank**2


def _svd(shape: Shape) -> Work:
    # Two decompositions of the whole stack (the result, and its error beside the exact sum).
    rank = min(max(shape.ranks), shape.d_in, shape.d_out)
    return _factors(shape, rank, _core_svd(shape, shape.total) + _qr_flops(shape.width, shape.total + rank))


def _knots(shape: Shape, passes: float) -> Work:
    rank = min(shape.total, shape.d_out)
    components = len(shape.ranks) * rank * shape.d_in
    qr = _qr_flops(shape.d_out, shape.total) + sum(_qr_flops(shape.d_in, r) for r in shape.ranks)
    # Twice: thresholds first, over all layers, then the merge.
    qr = 2 * (qr + 25.0 * rank**3 + 2.0 * shape.d_out * rank * shape.total + 2.0 * shape.total * rank * shape.d_in)
    work = _factors(shape, rank, qr)
    # The common basis of every layer stays too, in fp64.
    kept, entries = work.kept + 2 * work.output, work.entries + passes * components
    return Work(rank, work.output, work.working + 4 * components, kept, work.qr, 0.0, entries)


def _lego(shape: Shape) -> Work:
    clusters, rounds = max(shape.ranks), 10
    return _factors(shape, clusters, qr=2.0 * rounds * shape.total * clusters * shape.width)


def _dense(shape: Shape, products: int, passes: float, copies: int = 6) -> Work:
    """Work of a method on dense deltas, one layer at a time.

    Args:
        shape: The layer.
        products: How often every B @ A is formed: once to merge, and once for each pass over all layers before that.
        passes: Elementwise passes over every task's delta.
        copies: Matrices of this size in memory beside one for each task.
    """
    tasks = len(shape.ranks)
    product, entries = products * 2.0 * shape.size * shape.total, passes * tasks * shape.size
    return Work(None, shape.size, (tasks + copies) * shape.size, 0, 0.0, product, entries)


#: One layer's work by method. Numbers of passes are fitted to measured merges of 4096 x 4096 layers.
COSTS: Mapping[str, Callable[[Shape], Work]] = {
    "weight_average": lambda shape: _factors(shape, shape.total),
    "task_arithmetic": lambda shape: _factors(shape, shape.total),
    "linear": lambda shape: _factors(shape, max(shape.ranks)),
    "robust_merge": lambda shape: _factors(shape, max(shape.ranks), passes=12),
    "svd": _svd,
    "lora_lego": _lego,
    "knots_ties": lambda shape: _knots(shape, 10),
    "knots_dare_ties": lambda shape: _knots(shape, 14),
    "ties": lambda shape: _dense(shape, 3, 12),
    "dare_ties": lambda shape: _dense(shape, 2, 13),
    "emr": lambda shape: _dense(shape, 3, 9),
    "free_merging": lambda shape: _dense(shape, 1, 5, copies=0),
}


def _unknown(shape: Shape) -> Work:
    """Work of a method that has no entry: dense, with many passes."""
    return _dense(shape, 3, 12)


@dataclass(frozen=True)
class Estimate:
    """What one method would cost.

    Args:
        method: Its name.
        rank: Largest rank of the merged factors, None where the result is dense.
        seconds: Wall time of merging and saving.
        memory: Bytes at the peak, beside the program itself: adapters, the largest layer at work, what stays of others.
        disk: Bytes of the merge folder's weights.
    """

    method: str
    rank: int | None
    seconds: float
    memory: int
    disk: int


def estimate(adapters: Sequence[Adapter], speed: Speed) -> list[Estimate]:
    """Return what every method would cost on these adapters; nothing where they have no layer.

    Factor methods: output rank x (d_in + d_out) x 4 bytes per layer on disk, twice that in memory until it is written.
    Dense methods: d_in x d_out x 4 bytes per layer on disk, K + 6 such layers in memory, whatever the model's size.
    """
    shapes = _shapes(adapters)
    if not shapes:
        return []
    stored = sum(t.nbytes for a in adapters for f in a.layers.values() for t in (f.A, f.B))
    estimates = []
    for method in METHODS:
        works = [COSTS.get(method, _unknown)(shape) for shape in shapes]
        disk = 4 * sum(work.output for work in works)
        memory = stored + 4 * (sum(work.kept for work in works) + max(work.working for work in works))
        seconds = (stored + disk) / speed.disk + sum(
            work.qr / speed.qr + work.product / speed.product + work.entries / speed.entries for work in works
        )
        rank = None if any(work.rank is None for work in works) else max(work.rank or 0 for work in works)
        estimates.append(Estimate(method, rank, seconds, memory, disk))
    return estimates


def _shapes(adapters: Sequence[Adapter]) -> list[Shape]:
    shapes = []
    for layer in sorted({layer for adapter in adapters for layer in adapter.layers}):
        own = [adapter.layers[layer] for adapter in adapters if layer in adapter.layers]
        shapes.append(Shape(max(f.d_out for f in own), max(f.d_in for f in own), tuple(f.rank for f in own)))
    return shapes
