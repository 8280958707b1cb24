"""The table of a study of learned merges: mean and spread over seeds, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

#: One line of results, as :meth:`learned_suite.Suite.learn` returns it.
Line = Mapping[str, Any]


class Setting(NamedTuple):
    """What a row of the table is about."""

    objective: str
    start: float
    lr: float
    steps: int


class Row(NamedTuple):
    """One setting over its seeds; percent of the experts, spread is the sample standard deviation over seeds."""

    setting: Setting
    seeds: int
    mean: float
    mean_spread: float
    worst: float
    worst_spread: float


def read_lines(path: Path) -> list[Line]:
    """Return the finished fits; what a killed process left of a line is no fit."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def rows(lines: Iterable[Line]) -> list[Row]:
    """Return one row per setting, sorted; a fit counts once however often it stands there."""
    by_setting: dict[Setting, dict[int, Mapping[str, float]]] = defaultdict(dict)
    for line in lines:
        for steps, scores in line["scores"].items():
            setting = Setting(line["objective"], line["start"], line["lr"], int(steps))
            by_setting[setting][line["seed"]] = scores
    return [_row(setting, list(by_setting[setting].values())) for setting in sorted(by_setting)]


def _row(setting: Setting, scores: list[Mapping[str, float]]) -> Row:
    means, worsts = [fmean(s.values()) for s in scores], [min(s.values()) for s in scores]
    return Row(setting, len(scores), fmean(means), _spread(means), fmean(worsts), _spread(worsts))


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else float("nan")


def as_csv(table: Iterable[Row]) -> str:
    """Return one line per setting."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Setting._fields, *Row._fields[1:]])
    for row in table:
        writer.writerow([*row.setting, *row[1:]])
    return text.getvalue()


def as_markdown(table: Iterable[Row]) -> str:
    """Return one line per objective, start and learning rate; a column pair, mean and worst task, per step count."""
    table = list(table)
    steps = sorted({row.setting.steps for row in table})
    cells = {row.setting: row for row in table}
    header = ["objective", "start", "lr", "seeds", *(f"{what}, {n} steps" for n in steps for what in ("mean", "worst"))]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for objective, start, lr in dict.fromkeys(row.setting[:3] for row in table):
        found = [cells.get(Setting(objective, start, lr, n)) for n in steps]
        seeds = "/".join(str(n) for n in sorted({row.seeds for row in found if row}))
        numbers = [
            text
            for row in found
            for text in (
                (_number(row.mean, row.mean_spread), _number(row.worst, row.worst_spread)) if row else ("", "")
            )
        ]
        lines.append([objective, f"{start:.3g}", f"{lr:g}", seeds, *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _number(value: float, spread: float) -> str:
    return f"{value:.1f} ± {spread:.1f}" if spread == spread else f"{value:.1f}"
