"""NUFILT and OPCM per step, against the dense textbook recipe, side by side in one run: time, memory, difference, loss.

    python benchmarks/continual.py                 # d = 768 and 1024, all 72 linear layers of a ViT-B, rank 16
    python benchmarks/continual.py --quick         # one 768 x 768 layer
    python benchmarks/continual.py --kind full     # full checkpoints instead of adapters

Ours absorbs a whole adapter by ``append``; the recipe takes the same state, layer by layer. Both are timed in turns,
so that whatever else the machine does hits both; the ratio of CPU times leaves waiting out. Memory is what one step
adds to the process at its peak, the merge that it makes included. Linux.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import continual_dense
import torch
from continual_model import Kind, Sizes, dense
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from nscmerge import Adapter, LowRank, continual
from nscmerge.draws import generator

NUFILT: dict[str, Any] = {"filter_rank": 128, "adapter_rank": 64, "task_rank": 8, "steps": 50, "lr": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {"nufilt": NUFILT, "opcm": {"alpha": 0.5}}
SEED = 42


def state_before(sizes: Sizes, method: str, step: int) -> continual.State:
    """Return the merge that ``step`` finds."""
    made = continual.make(method, seed=SEED, **OPTIONS[method]) if method == "nufilt" else continual.make(method)
    state = made.start(sizes.expert(0))
    for number in range(1, step - 1):
        state = made.append(state, sizes.expert(number))
    return state


def ours(state: continual.State, expert: Adapter) -> continual.State:
    """Absorb one expert."""
    return continual.make(state.method, state.variant, **state.options).append(state, expert)


def recipe(
    method: str, names: list[str], state: continual.State, M: dict[str, Tensor], delta: dict[str, Tensor]
) -> dict[str, continual_dense.Absorbed]:
    """Absorb one expert the dense way."""
    if method == "nufilt":
        return {
            name: continual_dense.nufilt(
                M[name],
                delta[name],
                start(name, M[name].shape[1], state.t + 1),
                **{k: v for k, v in NUFILT.items() if k != "adapter_rank"},
            )
            for name in names
        }
    lam = state.scalars["lam"]
    sums = {name: continual_dense.opcm(M[name], delta[name], lam=lam, alpha=0.5) for name in names}
    norms = [state.scalars["norm_sum"], math.sqrt(sum(float(x.square().sum()) for x in delta.values()))]
    new = math.sqrt(sum(float(x.merged.square().sum()) for x in sums.values())) * (state.t + 1) / sum(norms)
    return {name: continual_dense.Absorbed(x.merged / new, 0.0) for name, x in sums.items()}


def start(name: str, d_in: int, step: int) -> Tensor:
    """Return the H that NUFILT draws for a layer and step, so that both ways begin alike."""
    own = generator(SEED, "nufilt", name.removesuffix(".weight"), str(step))
    drawn: Tensor = 0.02 * torch.randn(NUFILT["adapter_rank"], d_in, generator=own)
    return drawn


class Cost(NamedTuple):
    """Wall seconds, CPU seconds, and bytes added at the peak, the result included."""

    wall: float
    cpu: float
    added: int


def measured(run: Callable[[], Any]) -> tuple[Cost, Any]:
    """Return the cost of a call and what it gave."""
    before = _watermark()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall, cpu, _resident("VmHWM") - before), result


@dataclass(frozen=True)
class Compared:
    """One method, model and step.

    Args:
        ours: Median times of ours, memory of its first run.
        dense: The same of the recipe.
        sizes: Bytes of the merge, ours and dense.
        difference: Of results: largest over layers, relative to the layer's largest entry.
        exact: The same against the recipe in fp64; None where that was not run.
        losses: NUFILT's after the last step, summed over layers, ours and dense.
    """

    ours: Cost
    dense: Cost
    sizes: tuple[int, int]
    difference: float
    exact: float | None
    losses: tuple[float, float]


def compare(sizes: Sizes, method: str, step: int, repeats: int, threads: int, exact: bool) -> Compared:
    """Measure both ways in turns, from one state."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    _warm_up(Sizes(64, 1, 4, sizes.kind, True), method)
    names = sizes.names()
    state, expert, delta = state_before(sizes, method, step), sizes.expert(step - 1), sizes.deltas(step - 1)
    M = _dense(state, torch.float32)
    costs: list[tuple[Cost, Cost]] = []
    for _ in range(repeats):
        mine, after = measured(lambda: ours(state, expert))
        theirs, textbook = measured(lambda: recipe(method, names, state, M, delta))
        costs.append((mine, theirs))
    wide = (
        recipe(method, names, state, _dense(state, torch.float64), sizes.deltas(step - 1, torch.float64))
        if exact
        else None
    )
    loss = sum(line.get("loss_after", 0.0) for line in after.absorbed[-1].log.values())
    return Compared(
        _median([mine for mine, _ in costs]),
        _median([theirs for _, theirs in costs]),
        (_bytes(after.merged.values()), _bytes(x.merged for x in textbook.values())),
        _difference(after, textbook),
        None if wide is None else _difference(after, wide),
        (loss, sum(x.loss for x in textbook.values())),
    )


def _dense(state: continual.State, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: dense(state.weight(name), dtype) for name in state.shapes}


def _difference(state: continual.State, textbook: Mapping[str, continual_dense.Absorbed]) -> float:
    pairs = ((dense(state.weight(name), torch.float64), one.merged) for name, one in textbook.items())
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def _warm_up(sizes: Sizes, method: str) -> None:
    """Run both ways once on something small: first calls load BLAS and LAPACK code, which is nobody's cost."""
    state, delta = state_before(sizes, method, 2), sizes.deltas(1)
    ours(state, sizes.expert(1))
    recipe(method, sizes.names(), state, delta, delta)


def _median(costs: list[Cost]) -> Cost:
    # Memory of the first run: later ones find what it left.
    return Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs), costs[0].added)


def _bytes(weights: Iterable[LowRank | Tensor]) -> int:
    tensors = [x for w in weights for x in ((w.A, w.B) if isinstance(w, LowRank) else (w,))]
    return sum(x.numel() * x.element_size() for x in tensors)


def _watermark() -> int:
    """Reset the process's memory high-water mark and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def rows(models: list[Sizes], methods: list[str], steps: list[int], *more: Any) -> Iterator[list[str]]:
    """Yield one row of the table after another, each measured in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for sizes, method, step in track(
            [(s, m, t) for s in models for m in methods for t in steps], description="measuring"
        ):
            got = pool.apply(compare, (sizes, method, step, *more))
            mine, theirs = got.ours, got.dense
            yield [
                method,
                str(sizes.dim),
                str(step),
                f"{mine.wall:.3g} / {theirs.wall:.3g}",
                f"{theirs.wall / mine.wall:.1f}",
                f"{theirs.cpu / mine.cpu:.1f}",
                f"{mine.added / 1e6:.0f} / {theirs.added / 1e6:.0f}",
                f"{theirs.added / max(mine.added, 1):.1f}",
                f"{got.sizes[0] / 1e6:.1f} / {got.sizes[1] / 1e6:.1f}",
                f"{got.difference:.1e}",
                "-" if got.exact is None else f"{got.exact:.1e}",
                f"{got.losses[0]:.6g} / {got.losses[1]:.6g}" if got.losses[1] else "-",
            ]


HEADER = (
    "method",
    "d",
    "step",
    "seconds, ours / dense",
    "time ratio",
    "CPU time ratio",
    "MB added, ours / dense",
    "memory ratio",
    "merge, MB, ours / dense",
    "largest difference",
    "from fp64 recipe",
    "loss, ours / dense",
)


def main(
    dims: list[int] = [768, 1024],  # noqa: B006 (read off by the command line, never changed)
    methods: list[Literal["nufilt", "opcm"]] = ["nufilt", "opcm"],  # noqa: B006
    steps: list[int] = [2, 8],  # noqa: B006
    blocks: int = 12,
    rank: int = 16,
    kind: Kind = "lora",
    repeats: int = 1,
    threads: int = 1,
    exact: bool = False,
    quick: bool = False,
    markdown: bool = False,
) -> None:
    """Compare ours with the dense recipes.

    Args:
        dims: Widths d: per block four d x d, one 4 d x d and one d x 4 d.
        methods: Methods to run.
        steps: Which experts to absorb: the second finds a merge of rank 16, the eighth one of rank 112.
        blocks: Blocks of the model; 12 are a ViT-B.
        rank: Of the adapters.
        kind: Adapters, or deltas of full checkpoints with singular values ~ k^-0.5.
        repeats: Timed runs of each way, in turns; medians count. One run of many layers is a mean already.
        threads: CPU threads of both ways.
        exact: Run the recipe once more in fp64, and say how far ours is from that.
        quick: One 768 x 768 layer, five runs.
        markdown: Print a Markdown table, every row once it is measured.
    """
    models = [Sizes(dim, blocks, rank, kind, quick) for dim in ([768] if quick else dims)]
    found = rows(models, list(methods), steps, 5 if quick else repeats, threads, exact)
    if markdown:
        for line in itertools.chain((HEADER, ["---"] * len(HEADER)), found):
            print("|", " | ".join(line), "|", flush=True)
        return
    table = Table(title=f"{len(models[0].layers)} layers, {kind}, {threads} threads, per step")
    for title in HEADER:
        table.add_column(title)
    for row in found:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
