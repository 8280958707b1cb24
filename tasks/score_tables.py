"""Scores as CSV, Markdown and console tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nscmerge.console import print_table

if TYPE_CHECKING:
    from tasks.scores import Row, Scores

#: Beyond so many tasks a console does not hold a column for each, and a reader wants the summary first.
MOST_COLUMNS = 8
SUMMARY = ["avg", "avg_clipped", "worst", "spread"]


def as_csv(scores: Scores) -> str:
    """Return one line per candidate and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["candidate", "task", "metric", "higher_is_better", "value", "expert", "normalized", "group", "data"]
    writer.writerow(columns)
    for row in scores.rows:
        for task, info in scores.tasks.items():
            numbers = scores.value(row, task), scores.value(scores.expert, task), row.normalized[task]
            tail = info.group or "", scores.note or ""
            writer.writerow([row.name, task, info.metric, info.higher_is_better, *map(repr, numbers), *tail])
    return text.getvalue()


def summary_csv(scores: Scores) -> str:
    """Return one line per candidate: means of the groups, plain and clipped mean, worst task, spread."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["candidate", *scores.groups, "avg", "avg_clipped", "worst_task", "worst", "spread", "data"])
    for row in scores.rows:
        task, worst = row.worst
        groups = map(repr, scores.group_means(row).values())
        numbers = repr(row.mean), repr(row.clipped), task, repr(worst), repr(row.spread)
        writer.writerow([row.name, *groups, *numbers, scores.note or ""])
    return text.getvalue()


def as_markdown(scores: Scores) -> str:
    """Return the main table and the raw values below it; of many tasks the summary first."""
    blocks = [(header(scores), lines(scores))]
    if len(scores.tasks) > MOST_COLUMNS:
        blocks.insert(0, (summary_header(scores), summary_lines(scores)))
    blocks.append((["value", *scores.tasks], [[row.name, *_raw(scores, row)] for row in scores.rows]))
    parts = ["# Scores", ""]
    if scores.note:
        parts += [f"Data: {scores.note}.", ""]
    for head, body in blocks:
        cells = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
        parts += ["| " + " | ".join(line) + " |" for line in cells] + [""]
    notes = [
        "The expert row holds absolute values, every other row percent of it (expert / merged where lower is better).",
        "avg, worst task and spread (standard deviation over tasks) are of the percentages; avg_clipped counts a task",
        "as 100 at most.",
    ]
    notes += [f"- {note}." for note in (*scores.notes, *empty_lines(scores))]
    return "\n".join(parts + notes) + "\n"


def empty_lines(scores: Scores) -> list[str]:
    """Return one sentence per candidate that gave empty answers, saying how many of which task."""
    return [
        f"{name} gave empty answers: "
        + ", ".join(f"{n} of {scores.tasks[t].samples} in {t}" for t, n in counts.items())
        for name, counts in scores.empty_answers().items()
    ]


def header(scores: Scores) -> list[str]:
    """Return the columns of the main table; an arrow gives the metric's direction."""
    tasks = [f"{task} ({info.metric} {'↑' if info.higher_is_better else '↓'})" for task, info in scores.tasks.items()]
    return ["normalized %", *tasks, *scores.groups, *SUMMARY]


def lines(scores: Scores) -> list[list[str]]:
    """Return the main table: the expert in absolute values first, then the candidates in percent of it."""
    blank = [""] * (len(scores.groups) + len(SUMMARY))
    found = [["expert (absolute)", *_raw(scores, scores.expert), *blank]]
    for row in _measured(scores):
        found.append([row.name, *(f"{row.normalized[task]:.1f}" for task in scores.tasks), *_summary(scores, row)])
    return found


def summary_header(scores: Scores) -> list[str]:
    """Return the columns that sum up the tasks."""
    return ["normalized %", *scores.groups, *SUMMARY]


def summary_lines(scores: Scores) -> list[list[str]]:
    """Return what sums up the tasks, for every candidate but the experts."""
    return [[row.name, *_summary(scores, row)] for row in _measured(scores)]


def print_scores(scores: Scores) -> None:
    """Print the main table, narrow headers and the worst score without its task; of many tasks the summary."""
    many = len(scores.tasks) > MOST_COLUMNS
    first, *rest = summary_header(scores) if many else header(scores)
    title = "percent of each task's own expert" + (f"; data: {scores.note}" if scores.note else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in rest:
        table.add_column(re.sub(r"_| \(", "\n", name).rstrip(")"), justify="right", no_wrap=True)
    for name, *numbers in summary_lines(scores) if many else lines(scores):
        table.add_row(name, *(numbers if many else (number.partition(" ")[0] for number in numbers)))
    print_table(table)
    for line in empty_lines(scores):
        print(line)


def _measured(scores: Scores) -> Sequence[Row]:
    return [row for row in scores.rows if row is not scores.expert]


def _summary(scores: Scores, row: Row) -> list[str]:
    worst = f"{row.worst[1]:.1f} ({row.worst[0]})"
    groups = [f"{mean:.1f}" for mean in scores.group_means(row).values()]
    return [*groups, f"{row.mean:.1f}", f"{row.clipped:.1f}", worst, f"{row.spread:.1f}"]


def _raw(scores: Scores, row: Row) -> list[str]:
    values = [scores.value(row, task) for task in scores.tasks]
    return [f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}" for value in values]
