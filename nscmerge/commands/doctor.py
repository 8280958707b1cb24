"""``nscmerge doctor``: preflight of adapters before a merge, in seconds, from headers and factors alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from nscmerge.doctor.examine import examine
from nscmerge.doctor.show import print_report


def run(args: Sequence[str]) -> None:
    """Print the report; exit with status 1 if anything found keeps the adapters from being merged."""
    options = parser().parse_args(list(args)[1:])
    pairs = [split(adapter) for adapter in options.adapters]
    with Console(stderr=True).status(f"examining {len(pairs)} adapters"):
        report = examine([source for _, source in pairs], [name for name, _ in pairs], base=options.base)
    if options.format == "json":
        print(json.dumps(report.as_dict(), indent=2, allow_nan=False))
    else:
        print_report(report, Console(), all_layers=options.all_layers)
    if not report.ok:
        raise SystemExit(1)


def parser() -> ArgumentParser:
    """Return the parser of ``nscmerge doctor``."""
    top = ArgumentParser(
        prog="nscmerge doctor",
        description="Preflight of adapters before a merge: every fault by name, ranks, overlaps, cost of each method.",
    )
    top.add_argument("adapters", nargs="+", type=str, help="adapter folders or hub ids, or NAME=FOLDER")
    top.add_argument("--base", type=str, default=None, help="base model; only its config and headers are read")
    top.add_argument("--format", type=Literal["table", "json"], default="table", help="tables, or JSON for scripts")
    top.add_argument("--all_layers", action="store_true", help="list every layer instead of groups of equal ones")
    return top


def split(adapter: str) -> tuple[str | None, str]:
    """Return (name, source) of ``NAME=FOLDER``, (None, source) of a folder or hub id; a folder may have ``=`` in it."""
    name, mark, source = adapter.partition("=")
    return (None, adapter) if not (mark and name and source) or Path(adapter).exists() else (name, source)
