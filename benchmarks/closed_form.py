"""Closed-form methods against the dense textbook recipes, side by side in one run: time, memory, largest difference.

    python benchmarks/closed_form.py                       # one module of 1024 and 2048, K = 6, r = 16
    python benchmarks/closed_form.py --dims '[4096]'       # minutes: the dense SVDs of d x 6 d take them
    python benchmarks/closed_form.py --dims '[]' --modules 64   # a whole 7B-shaped set of adapters, merged and written

Every measurement runs in a process of its own. Memory is what the merge adds to the process at its peak.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from dense_recipes import DRAWN, RECIPES
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from nscmerge import Adapter, LowRank, merge
from nscmerge.methods import METHODS


class Measured(NamedTuple):
    """Seconds (median), bytes added at the peak, and the resident bytes of the whole process at its peak."""

    seconds: float
    added: int
    peak: int


def experts(dim: int, tasks: int, rank: int, modules: int = 1) -> list[Adapter]:
    """Return random adapters of square modules; the same for the same numbers."""
    draw = {"generator": torch.Generator().manual_seed(0)}
    return [
        Adapter(
            {
                f"layers.{i}.q_proj": LowRank(
                    torch.randn(rank, dim, **draw) / dim**0.5, torch.randn(dim, rank, **draw) / 50, 2.0
                )
                for i in range(modules)
            },
            name=f"task{k}",
        )
        for k in range(tasks)
    ]


def ours(method: str, adapters: Sequence[Adapter]) -> list[Tensor | LowRank]:
    """Return every merged layer, in the form that the method gives it."""
    return list(merge(adapters, method).layers.values())


def dense(method: str, adapters: Sequence[Adapter]) -> list[Tensor | LowRank]:
    """Return every merged layer by the textbook recipe."""
    return [RECIPES[method]([a.layers[name] for a in adapters]) for name in adapters[0].layers]


def measure(way: str, method: str, dim: int, tasks: int, rank: int, repeats: int, result: Path) -> Measured:
    """Time one way of one method on one module and keep its delta in ``result``; Linux."""
    torch.set_num_threads(multiprocessing.cpu_count())
    adapters = experts(dim, tasks, rank)
    run = {"ours": ours, "dense": dense}[way]
    # First calls load BLAS, LAPACK and FFT code, which is nobody's cost.
    run(method, experts(64, tasks, 4))
    before = _watermark()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        (merged,) = run(method, adapters)
        times.append(time.perf_counter() - start)
    peak = _resident("VmHWM")
    torch.save(merged.dense() if isinstance(merged, LowRank) else merged, result)
    return Measured(statistics.median(times), peak - before, peak)


def write_set(method: str, dim: int, tasks: int, rank: int, modules: int, folder: Path) -> Measured:
    """Merge a whole set of adapters and write the merge folder."""
    torch.set_num_threads(multiprocessing.cpu_count())
    adapters = experts(dim, tasks, rank, modules)
    before = _watermark()
    start = time.perf_counter()
    merge(adapters, method).save(folder / method)
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM")
    return Measured(seconds, peak - before, peak)


def _watermark() -> int:
    """Reset the process's memory high-water mark and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main(
    dims: list[int] = [1024, 2048],  # noqa: B006 (read off by the command line, never changed)
    methods: list[str] = list(METHODS),  # noqa: B006
    tasks: int = 6,
    rank: int = 16,
    repeats: int = 3,
    modules: int = 0,
    module_dim: int = 4096,
) -> None:
    """Compare ours with the dense recipes.

    Args:
        dims: Sizes d of one d x d module.
        methods: Methods to run.
        tasks: Adapters K.
        rank: Their rank r.
        repeats: Timed runs of ours and of cheap recipes; recipes above 2048 that need a dense SVD run once.
        modules: Also merge and write a set of adapters of so many modules; 64 is 7B-shaped (q and v of 32 blocks).
        module_dim: Their size.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as scratch, _fresh_processes() as pool:
        for dim in dims:
            table = Table(title=f"one module of {dim} x {dim}, K = {tasks}, r = {rank}")
            for title in ("method", "ours, s", "dense, s", "time ratio", "ours, MB", "dense, MB", "largest difference"):
                table.add_column(title)
            for method in track(methods, description=f"d = {dim}"):
                table.add_row(method, *_compare(pool, method, dim, tasks, rank, repeats, Path(scratch)))
            console.print(table)
        if modules:
            table = Table(title=f"{modules} modules of {module_dim} x {module_dim}, K = {tasks}, r = {rank}, written")
            for title in ("method", "seconds", "peak memory of the process, MB"):
                table.add_column(title)
            for method in track(methods, description="whole set"):
                # A folder of its own, gone before the next: dense merges take gigabytes.
                with tempfile.TemporaryDirectory() as folder:
                    got = pool.apply(write_set, (method, module_dim, tasks, rank, modules, Path(folder)))
                table.add_row(method, f"{got.seconds:.1f}", f"{got.peak / 1e6:.0f}")
            console.print(table)


def _fresh_processes() -> multiprocessing.pool.Pool:
    return multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)


def _compare(
    pool: multiprocessing.pool.Pool, method: str, dim: int, tasks: int, rank: int, repeats: int, scratch: Path
) -> list[str]:
    """Measure both ways of a method and return its row."""
    slow = dim > 2048 and method in ("svd", "knots_ties", "knots_dare_ties")
    got = {
        way: pool.apply(measure, (way, method, dim, tasks, rank, 1 if slow and way == "dense" else repeats, file))
        for way, file in (("ours", scratch / "ours.pt"), ("dense", scratch / "dense.pt"))
    }
    a, b = (torch.load(scratch / f"{way}.pt", weights_only=True) for way in ("ours", "dense"))
    difference = "drawn" if method in DRAWN else f"{float((a - b).abs().max() / b.abs().max()):.1e}"
    return [
        f"{got['ours'].seconds:.4f}",
        f"{got['dense'].seconds:.4f}",
        f"{got['dense'].seconds / got['ours'].seconds:.1f}",
        f"{got['ours'].added / 1e6:.0f}",
        f"{got['dense'].added / 1e6:.0f}",
        difference,
    ]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
