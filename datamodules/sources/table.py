"""One split's rows under our column names; nothing is decoded before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Table:
    """A view of a ``datasets.Dataset``: rows as ``{our name: value}``.

    Args:
        data: The rows.
        columns: ``{our name: name in the data}``.
        where: Where they come from, for messages.
    """

    def __init__(self, data: Any, columns: Mapping[str, str], where: str) -> None:
        self.columns, self.where = dict(columns), where
        self._data = data.select_columns(list(dict.fromkeys(self.columns.values())))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._data[index]
        return {ours: row[theirs] for ours, theirs in self.columns.items()}

    def __contains__(self, column: str) -> bool:
        """Whether the data have one of our columns; only optional ones may be missing."""
        return column in self.columns

    def column(self, name: str) -> list[Any]:
        """Return one column, without reading any other."""
        return list(self._data.select_columns([self.columns[name]])[:][self.columns[name]])

    def only(self, *names: str) -> Table:
        """Return the same rows with some of the columns; reading one then reads no other."""
        return Table(self._data, {name: self.columns[name] for name in names}, self.where)

    def class_names(self, name: str) -> list[str] | None:
        """Return the names that a column's numbers stand for, or None where they are just numbers."""
        names = getattr(self._data.features[self.columns[name]], "names", None)
        return None if names is None else list(names)

    def select(self, rows: Sequence[int]) -> Table:
        """Return some rows, in the given order."""
        return Table(self._data.select(rows), self.columns, self.where)

    def where_equal(self, name: str, value: Any) -> Table:
        """Return the rows in which a column has a value."""
        return self.select([i for i, got in enumerate(self.column(name)) if got == value])

    def undecoded(self, name: str) -> Table:
        """Return the same rows with the images of a column as ``{"bytes": ..., "path": ...}``, others untouched."""
        from datasets import Image

        column = self.columns[name]
        if not isinstance(self._data.features[column], Image):
            return self
        return Table(self._data.cast_column(column, Image(decode=False)), self.columns, self.where)
