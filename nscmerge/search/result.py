"""The record of a search: JSON, CSV, Markdown and console tables, and the merge folders of what was chosen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import nscmerge
from nscmerge.console import print_table
from nscmerge.folders import new_folder
from nscmerge.search.curve import Curve, MethodResult, number
from nscmerge.update import Update


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        methods: One entry per method, in order.
        updates: Every method's merge at scale 1.
        origin: Base, inputs, criteria and grid, for the record.
    """

    methods: Sequence[MethodResult]
    updates: Mapping[str, Update]
    origin: Mapping[str, Any]

    def merge(self, method: str, curve: str) -> Update:
        """Return the merge at the scale that a curve chose; its recipe holds all candidates of that curve."""
        entry = next(entry for entry in self.methods if entry.name == method)
        found = entry.curves[curve]
        update = self.updates[method].scaled(found.chosen if found.chosen is not None else 1.0)
        if update.recipe is None:
            return update
        search = {"criterion": curve, **found.as_json(), "grid": self.origin["grid"], "signs": list(entry.signs)}
        search["measured_by"] = self.origin["criteria"][curve.partition(".")[0]]
        notes = [*update.recipe.notes, f"The scale {found.chosen} was chosen by '{curve}' among {len(found.points)}."]
        recipe = replace(update.recipe, notes=notes, extra={**update.recipe.extra, "search": search})
        return replace(update, recipe=recipe)

    def as_json(self, config: Mapping[str, Any] | None = None) -> str:
        """Return everything."""
        content: dict[str, Any] = {"format": 1, **self.origin}
        content["versions"] = {package: metadata.version(package) for package in ("torch", "lightning", "transformers")}
        content["versions"]["nscmerge"] = nscmerge.__version__
        content["methods"] = {
            entry.name: {
                **asdict(entry.spec),
                "growth": number(entry.growth),
                "signs": list(entry.signs),
                "choices": entry.choices(),
                "curves": {name: curve.as_json() for name, curve in entry.curves.items()},
                "judge": entry.judged.as_json() if entry.judged is not None else None,
            }
            for entry in self.methods
        }
        content["config"] = config
        return json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"

    def as_csv(self) -> str:
        """Return one line per method, criterion, scale and task; the task ``mean`` is what scales are compared by."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "criterion", "lam", "task", "value"])
        for entry in self.methods:
            for curve in (*entry.curves.values(), *((entry.judged,) if entry.judged is not None else ())):
                for lam, point in curve.points.items():
                    for task, value in {**point.tasks, "mean": point.total}.items():
                        writer.writerow([entry.name, curve.name, lam, task, repr(value)])
        return text.getvalue()

    def blocks(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Yield (title, header, lines) of every table: what was chosen, and what the judge says of the choices."""
        names = list(self.methods[0].curves)
        chosen = [[e.name, *(_choice(e.curves[n]) for n in names), f"{e.growth:.2f}"] for e in self.methods]
        yield "scale chosen (value there)", ["method", *names, "growth"], chosen
        if all(entry.judged is not None for entry in self.methods):
            columns = [*names, "equal size", "scale 1", "oracle"]
            yield (
                "judged at the choices: mean / worst task (scale)",
                ["method", *columns],
                [[e.name, *(_judged(e, column) for column in columns)] for e in self.methods],
            )

    def as_markdown(self) -> str:
        """Return the tables and the warning signs."""
        parts = ["# Scale search", ""]
        for title, header, lines in self.blocks():
            cells = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
            parts += [f"{title[0].upper()}{title[1:]}:", ""] + ["| " + " | ".join(line) + " |" for line in cells] + [""]
        parts += [
            "growth: norm of the merged update at scale 1 over the mean norm of the experts'; equal size: its inverse.",
            "oracle: the judge's own best of the scales that it was asked for, which needs the answers.",
            "",
        ]
        found = [f"- {entry.name}: {sign}" for entry in self.methods for sign in entry.signs]
        return "\n".join([*parts, "Warning signs:" if found else "No warning signs.", "", *found]).rstrip() + "\n"

    def print(self) -> None:
        """Print the tables, as wide as they must be."""
        for title, header, lines in self.blocks():
            table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for i, column in enumerate(header):
                table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
            for line in lines:
                table.add_row(*line)
            print_table(table)
        for entry in self.methods:
            for sign in entry.signs:
                print(f"{entry.name}: {sign}")

    def write(
        self, folder: str | Path, merges_for: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``search.json``, ``.csv``, ``.md``, figures, and a merge folder per method and curve in ``merges_for``.

        Raises:
            OutputExistsError: The folder is there already.
        """
        from nscmerge.search.figures import curves_figure, judged_figure

        with new_folder(folder) as partial:
            texts = {"json": self.as_json(config), "csv": self.as_csv(), "md": self.as_markdown()}
            for suffix, text in texts.items():
                (partial / f"search.{suffix}").write_text(text, encoding="utf-8")
            curves_figure(self.methods).savefig(partial / "search.png", dpi=120)
            if self.methods[0].judged is not None:
                judged_figure(self.methods).savefig(partial / "judge.png", dpi=120)
            for entry in self.methods:
                for curve in merges_for:
                    self.merge(entry.name, curve).save(partial / "merges" / f"{entry.name}.{curve}")


def _choice(curve: Curve) -> str:
    chosen = curve.chosen
    return "none" if chosen is None else f"{chosen:g} ({curve.points[chosen].total:.4g})"


def _judged(entry: MethodResult, choice: str) -> str:
    lam = entry.choices().get(choice)
    if lam is None or entry.judged is None:
        return "none"
    return f"{entry.judged.points[lam].total:.1f} / {entry.judged.worst(lam):.1f} ({lam:g})"
