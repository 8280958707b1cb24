"""CSV, Markdown and figures of a protocol's results."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from tasks.continual.figures import curve_figure, matrix_figure, sweep_figure
from tasks.continual.results import Results

#: Headings of the losses, by their name in the record.
LOSSES = ("stability", "plasticity", "data_stability", "data_plasticity")


def write_report(results: Results, output: Path) -> str:
    """Write ``steps.csv``, ``summary.csv``, ``continual.md``, ``matrix.png`` and ``curve.png``; return the Markdown.

    ``sweep.png`` comes with them where methods differ from the first such method in one number each.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = as_markdown(results)
    for name, content in {
        "steps.csv": steps_csv(results),
        "summary.csv": summary_csv(results),
        "continual.md": text,
    }.items():
        (output / name).write_text(content, encoding="utf-8")
    if results.methods:
        matrix_figure(results).savefig(output / "matrix.png", dpi=150)
        curve_figure(results).savefig(output / "curve.png", dpi=150)
    for name in results.methods:
        if (figure := sweep_figure(results, name)) is not None:
            figure.savefig(output / "sweep.png", dpi=150)
            break
    return text


def steps_csv(results: Results) -> str:
    """Return one line per method, order, step and task seen."""
    columns = ["method", "order", "step", "position", "task", "metric", "score", "normalized", "seconds", "parameters"]
    lines = []
    numbers = {name: 0 for name in results.methods}
    for run in results.runs:
        if not run.complete:
            continue
        numbers[run.name] += 1
        normalized = results.matrix(run, True)
        for t, row in enumerate(run.rows):
            for i, task in enumerate(run.order[: t + 1]):
                cells = [run.name, numbers[run.name], t + 1, i + 1, task, results.tasks[task].metric]
                lines.append([*cells, row.scores[task], normalized[t][i], row.seconds, row.parameters])
    return _csv(columns, lines)


def summary_csv(results: Results) -> str:
    """Return one line per method: means and sample deviations over orders, mean losses, time of a step."""
    parts = ["acc", "bwt", "acc_normalized", "bwt_normalized", "learned_normalized", "worst_normalized"]
    columns = ["method", "orders", *(f"{p}_{s}" for p in parts for s in ("mean", "std")), *LOSSES, "seconds_per_step"]
    lines = []
    for name in results.methods:
        spreads = [results.acc(name), results.bwt(name), results.acc(name, True), results.bwt(name, True)]
        spreads += [results.learned(name), results.worst(name)]
        numbers = [value for spread in spreads for value in (spread.mean, spread.std)]
        losses = [results.loss(name, which) for which in LOSSES]
        lines.append([name, len(results.of(name)), *numbers, *losses, results.seconds(name)])
    return _csv(columns, lines)


def as_markdown(results: Results) -> str:
    """Return the tables: scores, losses, the last state per task."""
    orders = sorted({len(results.of(name)) for name in results.methods})
    said = " to ".join(map(str, dict.fromkeys([orders[0], orders[-1]]))) if orders else "0"
    parts = ["# Continual merging", ""]
    if results.note:
        parts += [f"Data: {results.note}.", ""]
    parts += [
        f"{len(results.tasks)} tasks, {said} orders. Mean ± sample standard deviation (ddof = 1) over orders.",
        "ACC: mean score of all tasks after the last step. BWT: mean change of the earlier tasks since they arrived.",
        "Normalized: percent of each task's own expert. Learned: each task just after it arrived.",
        "",
    ]
    raw = results.percent is not None
    head = ["method", *(["ACC", "BWT"] if raw else []), "ACC norm.", "BWT norm.", "learned norm.", "worst task norm."]
    rows = []
    for label, scores in (("expert", results.expert), ("base", results.base)):
        own = [f"{results.reference_mean(scores):.1f}", ""] if raw else []
        rows.append([label, *own, f"{results.reference_mean(scores, True):.1f}", "", "", ""])
    for name in results.methods:
        own = [str(results.acc(name)), str(results.bwt(name))] if raw else []
        rest = results.acc(name, True), results.bwt(name, True), results.learned(name), results.worst(name)
        rows.append([name, *own, *map(str, rest)])
    parts += _table(head, rows)
    if any(not math.isnan(results.loss(name, "stability")) for name in results.methods):
        parts += [
            "Losses, lower is better, mean over layers and over the steps from the second on: stability is how much a",
            "step moves what was there, plasticity how far the merge is from the new expert. In parameter space (what",
            "NUFILT minimises), and on the tasks' inputs. h.m.: harmonic mean of the two.",
            "",
        ]
        head = ["method", "stability", "plasticity", "h.m.", "stability (data)", "plasticity (data)", "h.m. (data)"]
        parts += _table([*head, "s / step"], [_losses(results, name) for name in results.methods])
    tasks = list(results.tasks)
    parts += ["Score of each task after the last step, percent of its expert, mean over orders.", ""]
    finals = []
    for name in results.methods:
        found = [dict(zip(run.order, results.matrix(run, True)[-1], strict=True)) for run in results.of(name)]
        finals.append([name, *(f"{sum(one[task] for one in found) / len(found):.1f}" for task in tasks)])
    parts += _table(["method", *tasks], finals)
    notes = {run.name: run.notes for run in results.runs if run.complete and run.notes}
    parts += [f"- {name}: {' '.join(texts)}" for name, texts in notes.items()]
    return "\n".join(parts).rstrip() + "\n"


def _losses(results: Results, name: str) -> list[str]:
    cells = []
    for prefix in ("", "data_"):
        pair = results.loss(name, f"{prefix}stability"), results.loss(name, f"{prefix}plasticity")
        cells += [*pair, results.harmonic(name, prefix)]
    return [name, *("" if math.isnan(x) else f"{x:.3g}" for x in cells), f"{results.seconds(name):.2f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [*("| " + " | ".join(line) + " |" for line in cells), ""]


def _csv(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()
