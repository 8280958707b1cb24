"""Learned merges over objectives, learning rates, step counts, start values and seeds: which choice is robust?

Every cell of the grid is one fit at a constant learning rate, saved after each of the step counts; the seed says which
unlabelled samples are drawn and in which order. All saved merges (``OUTPUT/merges``) are scored on the held-out samples
of all tasks. A scored fit is one line of ``OUTPUT/results.jsonl`` and is not done again; an interrupted one is. Tables
follow from that file: ``OUTPUT/table.md`` and ``OUTPUT/table.csv``.

    python benchmarks/learned_merges.py --config benchmarks/learned_merges.yaml
    python benchmarks/learned_merges.py --config benchmarks/learned_merges.yaml --grid.seeds '[0]' --threads 2
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import auto_cli
from learned_suite import Cell, Suite
from learned_table import as_csv, as_markdown, read_lines, rows
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from nscmerge.objectives import Objective


@dataclass(frozen=True)
class Grid:
    """All combinations of these; seeds vary slowest, so that a study that is cut short is balanced."""

    objectives: dict[str, Objective]
    lrs: list[float]
    steps: list[int]
    starts: list[float]
    seeds: list[int]

    def cells(self) -> list[Cell]:
        """Return the fits, in order."""
        return [
            Cell(name, start, lr, seed)
            for seed in self.seeds
            for start in self.starts
            for name in self.objectives
            for lr in self.lrs
        ]


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line in one write, so that several processes may share the file; never to a torn one's end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab", buffering=0) as file:
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


def main(output: Path, suite: Suite, grid: Grid, threads: int = 1) -> None:
    """Run what is missing of the grid and write the tables.

    Args:
        output: Folder of the results; may hold those of an earlier, interrupted or smaller study.
        suite: What is merged and scored.
        grid: What is varied.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    results, console = output / "results.jsonl", Console()
    wanted = {str(step) for step in grid.steps}
    done = {
        Cell(*(line[key] for key in Cell.__match_args__))
        for line in read_lines(results)
        if wanted <= line["scores"].keys()
    }
    missing = [cell for cell in grid.cells() if cell not in done]
    console.print(f"{len(missing)} of {len(grid.cells())} fits to do; the others are in {results}")
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        for cell in progress.track(missing, description="fits"):
            merges = {str(step): output / "merges" / cell.name / str(step) for step in grid.steps}
            seconds = 0.0
            if not all(folder.is_dir() for folder in merges.values()):
                seconds = suite.learn(cell, grid.objectives[cell.objective], grid.steps, output / "merges" / cell.name)
            scores = suite.scores(merges)
            append(results, {**asdict(cell), "scores": scores, "expert": suite.expert_values(), "seconds": seconds})
            found = {step: round(fmean(values.values()), 1) for step, values in scores.items()}
            progress.console.print(cell.name, found, f"{seconds:.0f} s")
    table = rows(read_lines(results))
    for suffix, text in {"md": as_markdown(table), "csv": as_csv(table)}.items():
        (output / f"table.{suffix}").write_text(text, encoding="utf-8")
    console.print(as_markdown(table), soft_wrap=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
