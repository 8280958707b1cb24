"""Scores of a suite: raw and normalized per candidate and task, what sums them up, and the folder that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from nscmerge.folders import new_folder
from tasks import score_tables
from tasks.metrics import normalized_score

#: Metric values by name.
Values = Mapping[str, float]
BASE, EXPERT = "base", "expert"
#: Metric that counts answers without any text.
EMPTY = "empty_answers"
#: Key of the record that says what the data are, where that must not be missed.
NOTE = "data"
#: Key of the record that says how the scores of each task were measured, where there is something to say.
NOTES = "notes"


@dataclass(frozen=True)
class TaskInfo:
    """What one column means.

    Attributes:
        metric: That counts.
        higher_is_better: Its direction.
        samples: On how many test samples it was measured.
        group: Whose mean it enters, such as the data set; None for no group.
    """

    metric: str
    higher_is_better: bool
    samples: int
    group: str | None = None


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
        """Plain mean of the normalized scores over tasks, percent; what the papers print."""
        return fmean(self.normalized.values())

    @property
    def clipped(self) -> float:
        """Mean over tasks of the normalized scores, each counted as 100 at most: no task makes up for another."""
        return fmean(min(score, 100.0) if math.isfinite(score) else score for score in self.normalized.values())

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
        origin: Base model, expert and merge folders, data, for the record; its ``data`` is said in every file.
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

    @property
    def note(self) -> str | None:
        """What the data are, where that must not be missed."""
        return self.origin.get(NOTE)

    @property
    def notes(self) -> list[str]:
        """How scores were measured, each remark once, with the tasks that it is about."""
        by_text: dict[str, list[str]] = {}
        for task, texts in self.origin.get(NOTES, {}).items():
            for text in texts:
                by_text.setdefault(text, []).append(task)
        return [f"{', '.join(tasks)}: {text}" for text, tasks in by_text.items()]

    def empty_answers(self) -> dict[str, dict[str, int]]:
        """Return how many answers were empty, by candidate and task, where any was: such a score is no accident."""
        found: dict[str, dict[str, int]] = {}
        for row in self.rows:
            for task in self.tasks:
                if (count := row.values[task].get(EMPTY, 0)) > 0:
                    found.setdefault(row.name, {})[task] = int(count)
        return found

    @property
    def groups(self) -> dict[str, list[str]]:
        """Tasks by group, in order of their first tasks; tasks without a group are left out."""
        found: dict[str, list[str]] = {}
        for task, info in self.tasks.items():
            if info.group is not None:
                found.setdefault(info.group, []).append(task)
        return found

    def value(self, row: Row, task: str) -> float:
        """Return a candidate's primary metric on a task, in its own unit."""
        return row.values[task][self.tasks[task].metric]

    def group_means(self, row: Row) -> dict[str, float]:
        """Return the plain mean of the normalized scores of every group, percent."""
        return {group: fmean(row.normalized[task] for task in tasks) for group, tasks in self.groups.items()}

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
                "mean": _number(row.mean),  # as avg; the name that format 1 began with
                "avg": _number(row.mean),
                "avg_clipped": _number(row.clipped),
                "groups": {group: _number(mean) for group, mean in self.group_means(row).items()},
                "worst": {"task": row.worst[0], "normalized": _number(row.worst[1])},
                "spread": _number(row.spread),
            }
            for row in self.rows
        }
        tasks = {t: {k: v for k, v in asdict(info).items() if v is not None} for t, info in self.tasks.items()}
        content = {"format": 1, **self.origin, "tasks": tasks, "candidates": candidates}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """Return one line per candidate and task."""
        return score_tables.as_csv(self)

    def as_markdown(self) -> str:
        """Return the tables of percentages and of raw values."""
        return score_tables.as_markdown(self)

    def print(self) -> None:
        """Print the main table, as wide as it must be; of many tasks what sums them up."""
        score_tables.print_scores(self)

    def write(self, folder: str | Path) -> None:
        """Write ``scores.json``, ``.csv``, ``.md`` and ``.png``, and ``summary.csv``, into a new folder.

        Raises:
            OutputExistsError: The folder is there already.
        """
        from tasks.score_figure import table_figure

        texts = {
            "scores.json": self.as_json(),
            "scores.csv": self.as_csv(),
            "summary.csv": score_tables.summary_csv(self),
            "scores.md": self.as_markdown(),
        }
        with new_folder(folder) as partial:
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            table_figure(self).savefig(partial / "scores.png", dpi=150)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
