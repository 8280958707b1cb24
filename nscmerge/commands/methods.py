"""``nscmerge methods``: the table of closed-form methods with their options and sources."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from nscmerge.methods.table import methods_table


def run(args: Sequence[str]) -> None:
    """Print the table; takes no options."""
    Console().print(methods_table())
