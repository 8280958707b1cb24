"""Tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table as wide as it must be: a cut number is worse than a wrapped line."""
    console, wide = Console(), Console(width=10_000)
    needed = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(console.width, needed)).print(table)
