"""Tables and progress on the console."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nscmerge.progress import Watch

T = TypeVar("T")


def print_table(table: Table) -> None:
    """Print a table as wide as it must be: a cut number is worse than a wrapped line."""
    console, wide = Console(), Console(width=10_000)
    needed = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(console.width, needed)).print(table)


@contextmanager
def progress_bars() -> Iterator[Watch]:
    """Yield a watch that shows a bar on stderr for every loop that it wraps, as long as the loop runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def watch(items: Iterable[T], label: str) -> Iterable[T]:
            task = progress.add_task(label, total=len(items) if isinstance(items, Sized) else None)
            try:
                for item in items:
                    yield item
                    progress.advance(task)
            finally:
                progress.remove_task(task)

        yield watch
