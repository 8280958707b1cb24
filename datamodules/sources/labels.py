"""Published labels, as numbers, names or numbered names, to the numbers that a task uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from datamodules.sources.table import Table
from nscmerge.errors import DataError

#: What data sets write where they hide or lack a label.
UNLABELLED = frozenset({"", "-", "-1", "hidden", "none"})


@dataclass(frozen=True)
class LabelMap:
    """What a label stands for, by its name where it has one and by its number only where it has none.

    A column of numbered names (a ClassLabel) is read by the names, since their order differs from copy to copy.

    Attributes:
        names: ``{name: index}``; compared in lower case, ``_`` and ``-`` read as blanks.
        numbers: ``{published number: index}``, for columns of bare numbers.
        dropped: Names that are known and whose rows are left out.
    """

    names: Mapping[str, int]
    numbers: Mapping[int, int]
    dropped: frozenset[str] = frozenset()

    def read(self, table: Table, column: str = "label") -> list[int | None]:
        """Return one index per row, None where the row has no label or one that is dropped.

        Raises:
            DataError: A name is unknown, or a value is neither a name nor a whole number.
        """
        names = table.class_names(column)
        values = table.column(column)
        if names is not None and not any(name.lstrip("-").isdigit() for name in names):
            values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]
        if values and isinstance(values[0], list | dict):
            raise DataError(f"{table.where}: column '{column}' holds {values[0]!r}; expected one label per row.")
        read = {value: self._read_one(value, column, table.where) for value in dict.fromkeys(values)}
        return [read[value] for value in values]

    def _read_one(self, value: object, column: str, where: str) -> int | None:
        if value is None or (isinstance(value, str) and value.strip().lower() in UNLABELLED):
            return None
        if isinstance(value, str) and not value.strip().isdigit():
            name = normalised(value)
            known = {normalised(n): i for n, i in self.names.items()}
            if name in known:
                return known[name]
            if name in {normalised(n) for n in self.dropped}:
                return None
            raise DataError(
                f"{where}: column '{column}' holds the label {value!r}; known are {', '.join(map(repr, self.names))}. "
                "Rename it in the data, or remove its rows."
            )
        if isinstance(value, float) and math.isnan(value):
            return None
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not value.is_integer()):
            raise DataError(f"{where}: column '{column}' holds the label {value!r}; expected a name or a whole number.")
        return self.numbers.get(int(value))


def normalised(name: str) -> str:
    """Return a label's name as names are compared: lower case, one blank for every run of ``_``, ``-`` and blanks."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
