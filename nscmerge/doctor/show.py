"""The report as tables on the console, readable at 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nscmerge.doctor.examine import Report
from nscmerge.doctor.findings import SEVERITIES

_STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}
#: Pairs and layers shown before the rest is only counted.
_MOST = 20

Row = Mapping[str, tuple[int, int | None]]


def print_report(report: Report, console: Console, *, all_layers: bool = False) -> None:
    """Print findings last, where the eye is; ``all_layers`` prints a row for each layer instead of grouping them."""
    for part in _parts(report, all_layers):
        console.print(part)


def _parts(report: Report, all_layers: bool) -> Iterator[RenderableType]:
    yield from _adapters(report)
    if table := report.ranks():
        yield from _ranks([c.name for c in report.candidates], table, all_layers)
    if any(overlap.layers for overlap in report.survey.overlaps.values()):
        yield from _overlaps(report)
    if report.estimates:
        yield from _estimates(report)
    yield from _findings(report)


def _table(title: str, *columns: str, numbers: int = 0) -> Table:
    """Return an empty table whose last ``numbers`` columns are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        number = i >= len(columns) - numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: names may hold what the console would take for markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _adapters(report: Report) -> Iterator[RenderableType]:
    facts = report.facts()
    bases = list(dict.fromkeys(fact["base_model"] for fact in facts if fact["base_model"]))
    several = ["base"] if len(bases) > 1 else []
    columns = ["layers", "rank", "s", "dtype", "params", "disk", "norm", "SHA-256"]
    table = _table("Adapters", "#", "adapter", *several, *columns, numbers=8)
    for number, fact in enumerate(facts, start=1):
        base = [str(bases.index(fact["base_model"]) + 1) if fact["base_model"] else "-"] if len(bases) > 1 else []
        if fact["layers"] is None:
            _add(table, str(number), fact["name"], *base, *"-----", _bytes(fact["bytes"]), "-", "-")
            continue
        _add(
            table, str(number), fact["name"], *base,
            str(fact["layers"]), _range(fact["ranks"]), _range(fact["scalings"]),
            ", ".join(fact["dtypes"]), _count(fact["parameters"]), _bytes(fact["bytes"]),
            "-" if fact["norm"] is None else f"{fact['norm']:.3g}", (fact["sha256"] or "-")[:10],
        )  # fmt: skip
    yield table
    for i, base in enumerate(bases):
        yield Text(f"base model {i + 1 if len(bases) > 1 else ''}".rstrip() + f": {base}")
    yield Text("")


def _ranks(names: Sequence[str], table: Mapping[str, Row], all_layers: bool) -> Iterator[RenderableType]:
    numbers = [f"#{i + 1}" for i in range(len(names))]
    shown = _table("Ranks by layer", "layers", "number", *numbers, numbers=len(names) + 1)
    for label, count, row in [(n, 1, r) for n, r in table.items()] if all_layers else group(table):
        _add(shown, label, str(count), *(_rank(row.get(name)) for name in names))
    yield shown
    yield _caption("stored rank; stored/numerical where the product's is lower; - where the adapter lacks the layer")


def _rank(ranks: tuple[int, int | None] | None) -> str:
    if ranks is None:
        return "-"
    stored, numerical = ranks
    return str(stored) if stored == numerical else f"{stored}/{'?' if numerical is None else numerical}"


def group(table: Mapping[str, Row]) -> list[tuple[str, int, Row]]:
    """Return layers with equal rows as one: those that differ in their first number only, as ``layers.[0-31].q``.

    Returns:
        (label, number of layers, row), in the order of first occurrence.
    """
    groups: dict[tuple[str, tuple[tuple[str, tuple[int, int | None]], ...]], list[tuple[str, str]]] = {}
    for name, row in table.items():
        match = re.search(r"(?<![^.])\d+(?![^.])", name)
        stem = f"{name[: match.start()]}[]{name[match.end() :]}" if match else name
        groups.setdefault((stem, tuple(sorted(row.items()))), []).append((name, match.group() if match else ""))
    lines = []
    for (stem, _), members in groups.items():
        label = members[0][0]
        if len(members) > 1:
            label = stem.replace("[]", f"[{_spans(sorted(int(number) for _, number in members))}]", 1)
        lines.append((label, len(members), table[members[0][0]]))
    return lines


def _spans(numbers: Sequence[int]) -> str:
    """Return sorted whole numbers as ``0-3,7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _overlaps(report: Report) -> Iterator[RenderableType]:
    overlaps = sorted(report.survey.overlaps.items(), key=lambda item: -abs(item[1].cosine or 0.0))
    table = _table("Overlap of pairs", "adapter", "adapter", "layers", "A rows", "B columns", "cosine", numbers=4)
    for (first, second), o in overlaps[:_MOST]:
        _add(table, first, second, str(o.layers), _decimal(o.rows), _decimal(o.columns), _decimal(o.cosine))
    yield table
    said = (
        "A rows, B columns: squared cosines of the angles between the spaces that they span, mean over shared layers, "
        "0 to 1"
    )
    if chances := [o.chance for _, o in overlaps if o.chance is not None]:
        said += f" (A rows of random adapters: {sum(chances) / len(chances):.4f})"
    said += "; cosine of the whole updates"
    if len(overlaps) > _MOST:
        said += f". These are {_MOST} of {len(overlaps)} pairs; --format json prints all"
    yield _caption(said)


def _estimates(report: Report) -> Iterator[RenderableType]:
    table = _table(
        "Cost of each method: an estimate from shapes", "method", "result", "time", "memory", "disk", numbers=3
    )
    for e in report.estimates:
        result = "dense" if e.rank is None else f"factors, rank {e.rank}"
        _add(table, e.method, result, _seconds(e.seconds), _bytes(e.memory), _bytes(e.disk))
    yield table
    yield _caption(
        "LoRA layers only; one thread, at the speed that this machine has now. Memory at the peak, beside some 0.4 GB "
        "for the program itself; disk of the output in fp32."
    )


def _caption(text: str) -> RenderableType:
    return Padding(Text(text, "dim"), (0, 0, 1, 0))


def _findings(report: Report) -> Iterator[RenderableType]:
    counts = {severity: sum(f.severity == severity for f in report.findings) for severity in SEVERITIES}
    for finding in report.findings:
        head = Text.assemble((finding.severity, _STYLE[finding.severity]), " ", (finding.code, "bold"))
        if finding.adapters:
            head.append(f"  {', '.join(finding.adapters)}")
        yield Group(
            head, Padding(Text(finding.found), (0, 0, 0, 4)), Padding(Text(finding.advice, "dim"), (0, 0, 0, 4))
        )
    said = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items() if count)
    verdict = ("can be merged", "bold green") if report.ok else ("cannot be merged as they are", "bold red")
    yield Text.assemble(said or "nothing found", "; these adapters ", verdict, ".")


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}-{values[-1]:g}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # adding 0.0 makes -0.0 positive


def _count(number: float) -> str:
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} G"


def _bytes(size: float | None) -> str:
    return "-" if size is None else f"{_count(size)}{'' if size >= 1000 else ' '}B"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
