"""What a growing folder has absorbed, in which order, and what each step did: as numbers, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nscmerge.console import print_table
from nscmerge.continual.folder import load_record
from nscmerge.continual.state import State
from nscmerge.continual.state_files import Measures

#: Shares and overlaps of a step, averaged over its layers.
_MEANS = ("rank_task", "rank_merged", "overlap_before", "expected", "overlap_after", "stability", "plasticity")
#: The same as the table calls them.
_COLUMNS = ("rank", "merged rank", "overlap before", "by chance", "after", "moved", "missed")
#: Losses that a method logs, summed over its layers.
_LOSSES = ("loss", "stability", "plasticity")


def report(folder: str | Path, *, layers: bool = False) -> dict[str, Any]:
    """Return what ``nscmerge continual show`` says, JSON-able.

    ``steps`` has one entry per expert, in order: ``name``, ``source``, ``sha256``, ``skipped`` (count), ``layers``
    (count of measured matrices); means over these of what :func:`nscmerge.continual.measures.measure` gives, None where
    there is nothing; ``rank_merged_max``; and ``losses``, sums over layers of what the method itself minimised, before
    and after its solve (NUFILT: ``loss``, ``stability``, ``plasticity``; WUDI: ``loss``).

    Args:
        folder: A growing folder.
        layers: Also ``by_layer`` in every step: measures and the method's log of each.

    Raises:
        AdapterError: The folder is missing, damaged, or written by a newer version.
    """
    record = load_record(folder)
    state = record.state
    steps = []
    for i, one in enumerate(state.absorbed):
        measured = record.measures[i] if i < len(record.measures) else {}
        step: dict[str, Any] = {"number": i + 1, "name": one.name, "source": one.source, "sha256": one.sha256}
        step |= {"skipped": len(one.skipped), "layers": len(measured)}
        step |= {name: _mean(line.get(name) for line in measured.values()) for name in _MEANS}
        step["rank_merged_max"] = max((r for m in measured.values() if (r := m.get("rank_merged"))), default=None)
        step["losses"] = _losses(one.log)
        if layers:
            names = sorted({*measured, *one.log})
            step["by_layer"] = {name: {**measured.get(name, {}), "log": dict(one.log.get(name, {}))} for name in names}
        steps.append(step)
    return {"folder": str(folder), **_summary(state), "steps": steps}


def _summary(state: State) -> dict[str, Any]:
    whole = sum(name not in set(state.layers) for name in state.shapes)
    return {
        "method": state.method,
        "variant": state.variant,
        "options": dict(state.options),
        "base_model": state.base_model,
        "t": state.t,
        "layers": len(state.layers),
        "tensors": whole,
        "scalars": dict(state.scalars),
    }


def _losses(log: Measures) -> dict[str, float]:
    """Return the sums over layers of every logged loss, before and after."""
    found: dict[str, float] = {}
    for name in (f"{loss}_{when}" for loss in _LOSSES for when in ("before", "after")):
        if values := [line[name] for line in log.values() if name in line]:
            found[name] = sum(values)
    return found


def _mean(values: Iterable[float | int | None]) -> float | None:
    some = [value for value in values if value is not None]
    return sum(some) / len(some) if some else None


def print_report(found: Mapping[str, Any], console: Console) -> None:
    """Print a :func:`report` as tables; with ``by_layer`` in its steps, the layers of the last step too."""
    options = ", ".join(f"{name} = {value}" for name, value in found["options"].items())
    head = f"{found['method']} (variant {found['variant']}{'; ' + options if options else ''})"
    size = f"{found['layers']} layers" if found["layers"] else f"{found['tensors']} tensors"
    console.print(Text(f"{head}\n{found['t']} experts in {size} of {found['base_model'] or 'an unknown base model'}"))
    if found["scalars"]:
        console.print(Text(", ".join(f"{name} = {value:.6g}" for name, value in found["scalars"].items())))
    absorbed = _table("Absorbed, in order", "#", "task", "SHA-256", "source", numbers=0)
    for step in found["steps"]:
        _add(absorbed, str(step["number"]), step["name"], (step["sha256"] or "-")[:12], step["source"] or "in memory")
    print_table(absorbed)
    print_table(_steps(found["steps"]))
    console.print(
        Text(
            "Means over layers. Overlap: share of the task's leading directions inside those of the merge before and "
            "after the step; by chance: what an unrelated task has. Moved: how far the step changed what the merge did "
            "on its own leading directions (stability). Missed: how far the merge is from the task on the task's "
            "(plasticity). Both relative and squared, 0 at best. No data is used."
        )
    )
    if any(step["losses"] for step in found["steps"]):
        print_table(_solved(found["steps"]))
    if "by_layer" in found["steps"][-1]:
        print_table(_layers(found["steps"][-1]))


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Steps", "#", "task", *_COLUMNS, numbers=len(_COLUMNS))
    for step in steps:
        cells = (_number(step[name]) for name in _MEANS)
        _add(table, str(step["number"]), step["name"], *cells)
    return table


def _solved(steps: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for step in steps for name in step["losses"]))
    shown = [name.replace("_", " ") for name in names]
    table = _table("What the method minimised, summed over layers", "#", "task", *shown, numbers=len(names))
    for step in steps:
        _add(table, str(step["number"]), step["name"], *(_number(step["losses"].get(name)) for name in names))
    return table


def _layers(step: Mapping[str, Any]) -> Table:
    title = f"Layers in step {step['number']}, '{step['name']}'"
    table = _table(title, "layer", *_COLUMNS, numbers=len(_COLUMNS))
    for name, line in step["by_layer"].items():
        _add(table, name, *(_number(line.get(key)) for key in _MEANS))
    return table


def _table(title: str, *columns: str, numbers: int) -> Table:
    """Return an empty table whose last ``numbers`` columns are numbers."""
    table = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        number = i >= len(columns) - numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: names may hold what the console would take for markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3g}"
