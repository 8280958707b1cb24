"""Results of a protocol: accuracy matrices, ACC and BWT, mean and spread over orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from nscmerge.continual.surrogates import harmonic_mean
from tasks.continual.record import Run
from tasks.metrics import average_accuracy, backward_transfer, normalized_score


@dataclass(frozen=True)
class Column:
    """What a task's score means: the metric that counts, and its direction."""

    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class Spread:
    """Mean over orders, and the sample standard deviation (ddof = 1); NaN where there is one order only."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return mean and deviation; NaN for no value."""
        if not values:
            return cls(math.nan, math.nan)
        finite = all(map(math.isfinite, values))
        return cls(fmean(values), stdev(values) if len(values) > 1 and finite else math.nan)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return ""
        return f"{self.mean:.1f}" if math.isnan(self.std) else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Results:
    """All runs of a protocol.

    Args:
        tasks: What each task's score means.
        base: Scores of the plain base model.
        expert: Scores of every task's own expert.
        runs: Methods and orders; incomplete ones are left out of all means.
        percent: Turns scores into percent; None: only normalized scores are averaged.
        note: What the data are, where that must be said.
    """

    tasks: Mapping[str, Column]
    base: Mapping[str, float]
    expert: Mapping[str, float]
    runs: Sequence[Run]
    percent: float | None = 100.0
    note: str | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the methods with a complete run, in order."""
        return list(dict.fromkeys(run.name for run in self.runs if run.complete))

    def of(self, name: str) -> list[Run]:
        """Return the complete runs of a method."""
        return [run for run in self.runs if run.name == name and run.complete]

    def matrix(self, run: Run, normalized: bool) -> list[list[float]]:
        """Return a[t][i]: score of the task at position i after step t, i <= t.

        Args:
            run: Whose.
            normalized: In percent of the task's expert (inverted where lower is better); else as ``percent`` says.
        """
        rows = []
        for t, row in enumerate(run.rows):
            rows.append([self._value(task, row.scores[task], normalized) for task in run.order[: t + 1]])
        return rows

    def acc(self, name: str, normalized: bool = False) -> Spread:
        """Return ACC over the orders of a method: mean score of all tasks after the last step."""
        return Spread.of([average_accuracy(self.matrix(run, normalized)) for run in self.of(name)])

    def bwt(self, name: str, normalized: bool = False) -> Spread:
        """Return BWT over the orders of a method: mean change of the earlier tasks since they arrived."""
        return Spread.of([backward_transfer(self.matrix(run, normalized)) for run in self.of(name)])

    def worst(self, name: str) -> Spread:
        """Return the lowest normalized score of a task after the last step."""
        return Spread.of([min(self.matrix(run, True)[-1]) for run in self.of(name)])

    def learned(self, name: str) -> Spread:
        """Return the mean normalized score of each task just after it arrived: the diagonal of the matrix."""
        return Spread.of([fmean(row[-1] for row in self.matrix(run, True)) for run in self.of(name)])

    def loss(self, name: str, which: str) -> float:
        """Return a loss of a method, mean over the steps from the second on, then over orders; NaN if not measured."""
        per_run = [
            fmean(row.losses[which] for row in run.rows[1:])
            for run in self.of(name)
            if len(run.rows) > 1 and all(which in row.losses for row in run.rows[1:])
        ]
        return fmean(per_run) if per_run else math.nan

    def harmonic(self, name: str, prefix: str = "") -> float:
        """Return the harmonic mean of the mean stability and plasticity losses."""
        pair = self.loss(name, f"{prefix}stability"), self.loss(name, f"{prefix}plasticity")
        return math.nan if any(map(math.isnan, pair)) else harmonic_mean(*pair)

    def seconds(self, name: str) -> float:
        """Return the mean time of a step from the second on."""
        return fmean(row.seconds for run in self.of(name) for row in run.rows[1:] or run.rows)

    def curve(self, name: str) -> list[Spread]:
        """Return the mean normalized score of the tasks seen so far, after every step."""
        steps = zip(*(self.matrix(run, True) for run in self.of(name)), strict=True)
        return [Spread.of([fmean(row) for row in rows]) for rows in steps]

    def mean_matrix(self, name: str) -> list[list[float]]:
        """Return the mean over orders of the normalized matrix, by position in the order."""
        matrices = [self.matrix(run, True) for run in self.of(name)]
        return [[fmean(m[t][i] for m in matrices) for i in range(t + 1)] for t in range(len(matrices[0]))]

    def reference_mean(self, scores: Mapping[str, float], normalized: bool = False) -> float:
        """Return the mean over tasks of the base's or the experts' scores."""
        return fmean(self._value(task, scores[task], normalized) for task in self.tasks)

    def line(self, name: str) -> str:
        """Return one sentence about a method, for a log."""
        n = len(self.of(name))
        return f"  {name}: normalized ACC {self.acc(name, True)}, BWT {self.bwt(name, True)} over {n} order(s)"

    def _value(self, task: str, score: float, normalized: bool) -> float:
        if normalized:
            return normalized_score(score, self.expert[task], self.tasks[task].higher_is_better)
        return math.nan if self.percent is None else self.percent * score
