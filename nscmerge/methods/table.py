"""The table of methods, read off the functions themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rich.table import Table

from nscmerge.methods import METHODS

_COMMON = "Every method also takes rank and energy, which cut its result to low-rank factors."


def methods_table() -> Table:
    """Return one row per method and variant: name, what it returns, options with defaults, source."""
    table = Table(title="Closed-form merging methods", caption=_COMMON, show_lines=True)
    for column in ("method", "variant", "returns", "options", "source"):
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "variant"))
    for name, method in METHODS.items():
        for variant, function in method.variants.items():
            options = "\n".join(f"{key} = {value!r}" for key, value in method.options(variant).items())
            table.add_row(name, variant, _summary(function), options, _source(function))
    return table


def _summary(function: Callable[..., Any]) -> str:
    """First line of the docstring, without its leading verb and markup."""
    return (inspect.getdoc(function) or "").partition("\n")[0].removeprefix("Return ").replace("``", "")


def _source(function: Callable[..., Any]) -> str:
    """The docstring's ``Source:`` line, which every method has."""
    return (inspect.getdoc(function) or "").partition("Source: ")[2].partition("\n")[0]
