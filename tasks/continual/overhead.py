"""``python -m tasks.continual.overhead --config FILE``: time, memory and size of every method, without any test."""

from __future__ import annotations

import csv
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import fmean

from nscmerge.continual import State
from nscmerge.memory import peak_memory
from tasks.continual.cli import one_line_errors, parse
from tasks.continual.steps import parameters
from tasks.expert import read_expert


@dataclass(frozen=True)
class Overhead:
    """What merging the first order took.

    Args:
        method: Name in the tables.
        seconds_per_step: Wall time, mean from the second step on; no reading.
        cpu_seconds_per_step: Processor time of all threads, likewise; what others do on the machine hardly moves it.
        seconds: Wall time of all steps.
        start_mb: Largest resident size of the process before the first step: libraries, experts, for methods that
            learn the model.
        peak_mb: After the last.
        parameters: Numbers in the merge.
    """

    method: str
    seconds_per_step: float
    cpu_seconds_per_step: float
    seconds: float
    start_mb: float
    peak_mb: float
    parameters: int


def measure(args: Sequence[str] | None, name: str) -> Overhead:
    """Return the overhead of one method; to be called in a process of its own, whose peak is its own."""
    cli = parse(args)
    module = cli.model
    form, order = module.methods[name], module.orders[0]
    method = module.made(form, cli.datamodule)
    if module.checkpoint_class is None:
        experts = {task: read_expert(module.experts[task], task)[0] for task in order}
    start_mb = _megabytes()
    state: State | None = None
    wall, cpu = [], []
    for task in order:
        expert = experts[task] if module.checkpoint_class is None else module.expert(task)
        start, cpu_start = time.perf_counter(), time.process_time()
        state = method.start(expert) if state is None else method.append(state, expert)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    assert state is not None
    steps = slice(1 if len(order) > 1 else 0, None)
    means = fmean(wall[steps]), fmean(cpu[steps])
    return Overhead(name, *means, sum(wall), start_mb, _megabytes(), parameters(state))


def as_markdown(rows: Sequence[Overhead]) -> str:
    """Return the table."""
    lines = [
        "| method | s / step | CPU s / step | s, all steps | MB before | MB at most | parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = row.seconds_per_step, row.cpu_seconds_per_step, row.seconds
        cells = [*(f"{x:.3f}" for x in times), f"{row.start_mb:.0f}", f"{row.peak_mb:.0f}"]
        lines.append(f"| {row.method} | {' | '.join(cells)} | {row.parameters:,} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Overhead], folder: Path) -> None:
    """Write ``overhead.csv`` and ``overhead.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "overhead.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Overhead)])
        writer.writerows(map(astuple, rows))
    (folder / "overhead.md").write_text(as_markdown(rows), encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """Measure every method in a new process, write and print."""
    args = list(sys.argv[1:] if args is None else args)
    with one_line_errors():
        module = parse(args).model
        context = multiprocessing.get_context("spawn")
        rows = []
        for name in module.methods:
            with context.Pool(1) as pool:
                rows.append(pool.apply(measure, (args, name)))
        write(rows, module.tables)
        print(as_markdown(rows))


def _megabytes() -> float:
    return (peak_memory() or 0) / 2**20


if __name__ == "__main__":
    main()
