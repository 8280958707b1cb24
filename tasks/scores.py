"""Scores of a suite: raw and normalized per candidate and task, and their JSON, CSV, Markdown and console tables."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nscmerge.console import print_table
from nscmerge.folders import new_folder
from tasks.metrics import normalized_score

#: Metric values by name.
Values = Mapping[str, float]
BASE, EXPERT = "base", "expert"


@dataclass(frozen=True)
class TaskInfo:
    """What one column means: the metric that counts, its direction, and on how many test samples it was measured."""

    metric: str
    higher_is_better: bool
    samples: int


@dataclass(frozen=True)
class Row:
    """One candidate on all tasks.

    Attributes:
        name: ``base``, ``expert`` (every task's own one), or a merge.
        values: All metrics per task.
        normalized: Percent of the expert per task.
    """

    name: str
    values: Mapping[str, Values]
    normalized: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean of the normalized scores over tasks, percent."""
        return fmean(self.normalized.values())

    @property
    def worst(self) -> tuple[str, float]:
        """Task with the lowest normalized score, and that score; a NaN counts as lowest."""
        return min(self.normalized.items(), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])

    @property
    def spread(self) -> float:
        """Standard deviation of the normalized scores over tasks (divided by their number), percentage points."""
        finite = all(map(math.isfinite, self.normalized.values()))
        return pstdev(self.normalized.values()) if finite else math.nan


@dataclass(frozen=True)
class Scores:
    """A benchmark's result.

    Attributes:
        tasks: Columns, in order.
        rows: Candidates, in order; the one named ``expert`` is what the others are measured against.
        origin: Base model, expert and merge folders, for the record.
    """

    tasks: Mapping[str, TaskInfo]
    rows: Sequence[Row]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tasks: Mapping[str, TaskInfo],
        values: Mapping[str, Mapping[str, Values]],
        origin: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Return the scores of raw metric values.

        Args:
            tasks: What counts for each task.
            values: ``{candidate: {task: {metric: value}}}``, ``expert`` among the candidates.
            origin: For the record.
        """
        rows = []
        for name, per_task in values.items():
            normalized = {
                task: normalized_score(
                    per_task[task][info.metric], values[EXPERT][task][info.metric], info.higher_is_better
                )
                for task, info in tasks.items()
            }
            rows.append(Row(name, per_task, normalized))
        return cls(tasks, rows, origin or {})

    @property
    def expert(self) -> Row:
        """The reference row."""
        return next(row for row in self.rows if row.name == EXPERT)

    def value(self, row: Row, task: str) -> float:
        """Return a candidate's primary metric on a task, in its own unit."""
        return row.values[task][self.tasks[task].metric]

    def as_json(self) -> str:
        """Return everything; what is not a finite number is null."""
        candidates = {
            row.name: {
                "tasks": {
                    task: {
                        "value": _number(self.value(row, task)),
                        "expert": _number(self.value(self.expert, task)),
                        "normalized": _number(row.normalized[task]),
                        "metrics": {metric: _number(value) for metric, value in row.values[task].items()},
                    }
                    for task in self.tasks
                },
                "mean": _number(row.mean),
                "worst": {"task": row.worst[0], "normalized": _number(row.worst[1])},
                "spread": _number(row.spread),
            }
            for row in self.rows
        }
        tasks = {task: info.__dict__ for task, info in self.tasks.items()}
        content = {"format": 1, **self.origin, "tasks": tasks, "candidates": candidates}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """Return one line per candidate and task."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["candidate", "task", "metric", "higher_is_better", "value", "expert", "normalized"])
        for row in self.rows:
            for task, info in self.tasks.items():
                numbers = self.value(row, task), self.value(self.expert, task), row.normalized[task]
                writer.writerow([row.name, task, info.metric, info.higher_is_better, *map(repr, numbers)])
        return text.getvalue()

    def as_markdown(self) -> str:
        """Return the console table, and the raw values below it."""
        blocks = [(self.header(), self.lines())]
        blocks.append((["value", *self.tasks], [[r.name, *self._raw(r)] for r in self.rows]))
        parts = ["# Scores", ""]
        for header, lines in blocks:
            cells = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
            parts += ["| " + " | ".join(line) + " |" for line in cells] + [""]
        notes = [
            "First table: the expert row holds absolute values, every other row percent of it (expert / merged where",
            "lower is better); mean, worst task and spread (standard deviation over tasks) are of the percentages.",
        ]
        return "\n".join(parts + notes) + "\n"

    def header(self) -> list[str]:
        """Return the columns of the main table; an arrow gives the metric's direction."""
        tasks = [f"{task} ({info.metric} {'↑' if info.higher_is_better else '↓'})" for task, info in self.tasks.items()]
        return ["normalized %", *tasks, "mean", "worst", "spread"]

    def lines(self) -> list[list[str]]:
        """Return the main table: the expert in absolute values first, then the candidates in percent of it."""
        lines = [[f"{EXPERT} (absolute)", *self._raw(self.expert), "", "", ""]]
        for row in self.rows:
            if row.name != EXPERT:
                percent = [f"{row.normalized[task]:.1f}" for task in self.tasks]
                worst = f"{row.worst[1]:.1f} ({row.worst[0]})"
                lines.append([row.name, *percent, f"{row.mean:.1f}", worst, f"{row.spread:.1f}"])
        return lines

    def table(self) -> Table:
        """Return the main table for the console: narrow headers, the worst score without its task, nothing cut off."""
        first, *rest = self.header()
        title = "percent of each task's own expert"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(first, no_wrap=True)
        for name in rest:
            table.add_column(re.sub(r"_| \(", "\n", name).rstrip(")"), justify="right", no_wrap=True)
        for name, *numbers in self.lines():
            table.add_row(name, *(number.partition(" ")[0] for number in numbers))
        return table

    def print(self) -> None:
        """Print the main table, as wide as it must be."""
        print_table(self.table())

    def write(self, folder: str | Path) -> None:
        """Write ``scores.json``, ``scores.csv`` and ``scores.md`` into a new folder.

        Raises:
            OutputExistsError: The folder is there already.
        """
        with new_folder(folder) as partial:
            for suffix, text in {"json": self.as_json(), "csv": self.as_csv(), "md": self.as_markdown()}.items():
                (partial / f"scores.{suffix}").write_text(text, encoding="utf-8")

    def _raw(self, row: Row) -> list[str]:
        return [f"{self.value(row, task):.3f}" for task in self.tasks]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
