"""From a data set's spec and the user's ``source`` to tables: local data first, then the hub and its fallbacks."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.base import Split
from datamodules.sources.hub import load_place, reason, unreachable
from datamodules.sources.local import BUILDERS, LocalData, stand_in_note
from datamodules.sources.spec import DatasetSpec, Part, Place, as_tuple
from datamodules.sources.table import Table
from nscmerge.base_model import PACKAGE_SCHEME, resolve_source
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError


class Source:
    """One opened copy of a data set.

    Args:
        spec: What the data set is.
        name: The folder or hub id that was opened.
        load: Returns the ``datasets.Dataset`` of a published split, or None.
        names: The published splits that are there, for messages.
        place: The copy on the hub, where it is one.
        note: What the data say that they stand in for.
        missed: ``"id: why"`` of every copy that was tried before this one.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        name: str,
        load: Callable[[str], Any | None],
        names: Sequence[str],
        place: Place | None = None,
        note: str | None = None,
        missed: Sequence[str] = (),
    ) -> None:
        self.spec, self.name, self.place, self.note, self.missed = spec, name, place, note, list(missed)
        self._load, self._names = load, list(names)

    def split(self, split: Split, keep: Callable[[Table], Sequence[int]] | None = None) -> Table:
        """Return one of our splits.

        Args:
            split: Which one.
            keep: Returns the rows to keep; applied before a cut, as the papers' code has it.

        Raises:
            DatasetNotFoundError: The published split that it is made from is not there.
            DataError: A column is not there, or no row is left.
        """
        part = self.spec.part(split, self.place)
        table, name = self._published(split, part)
        if part.where is not None:
            table = table.where_equal(*part.where)
        if keep is not None:
            total, table = len(table), table.select(keep(table))
            if total and not len(table):
                raise DataError(f"{table.where}: none of {total} rows has a label that {self.spec.name} uses.")
        if not len(table):
            wanted = f" with {part.where[0]} = {part.where[1]!r}" if part.where else ""
            raise DataError(f"{table.where}: the published split '{name}' has no rows{wanted}; '{split}' needs some.")
        return table if part.cut is None else table.select(part.cut.indices(len(table))[part.side])

    def published(self, names: Sequence[str]) -> bool:
        """Whether a published split of one of these names is there."""
        return any(self._load(name) is not None for name in names)

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data, JSON-able."""
        told: dict[str, Any] = {"source": self.name}
        if self.note:
            told["data"] = self.note
        if self.missed:
            told["instead_of"] = self.missed
        return told

    def _published(self, split: Split, part: Part) -> tuple[Table, str]:
        for name in part.alternatives:
            if (data := self._load(name)) is not None:
                where = f"{self.spec.name}: {self.name} ({name})"
                return Table(data, self._columns(list(data.column_names), where), where), name
        raise DatasetNotFoundError(
            f"{self.spec.name}: {self.name} has no split {' or '.join(map(repr, part.alternatives))}, which '{split}' "
            f"is made from; it holds {', '.join(self._names) or 'nothing that is known'}. Expected {self.spec.schema}."
        )

    def _columns(self, there: list[str], where: str) -> dict[str, str]:
        found, missing = {}, []
        for ours, names in self.spec.columns.items():
            theirs = next((name for name in as_tuple(names) if name in there), None)
            if theirs is not None:
                found[ours] = theirs
            elif ours not in self.spec.optional:
                missing.append(" or ".join(map(repr, as_tuple(names))))
        if missing:
            raise DataError(f"{where} has no column {', no column '.join(missing)}; it has {', '.join(there)}.")
        return found


def open_source(spec: DatasetSpec, source: str | None = None) -> Source:
    """Return a data set, from disk where ``source`` is a path, else from the hub.

    Args:
        spec: What the data set is.
        source: A folder or file; ``package:NAME/FOLDER``; a hub id, ``owner/name[:config][@revision]``, then without
            fallbacks; None takes the places of ``spec`` in order.

    Raises:
        ConfigError: The package `datasets` is not installed, or ``source`` is neither path nor id.
        DatasetNotFoundError: There is no such path, or no copy on the hub can be had; says why, copy by copy.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{spec.name} needs the package `datasets`; install nscmerge[language].")
    if source is not None and is_path(source):
        return _open_local(spec, source)
    places = list(spec.places) if source is None else [_place(spec, source)]
    missed: list[str] = []
    last: Exception | None = None
    for place in places:
        try:
            loaded = load_place(place)
        except Exception as error:  # any of several libraries' errors; told in our words below
            missed.append(f"{place}: {reason(error)}")
            last = error
            if unreachable(error):
                missed += [f"{other}: not tried" for other in places[len(missed) :]]
                break
            continue
        if missed:
            warnings.warn(f"{spec.name}: reading {place} instead of {'; '.join(missed)}.", stacklevel=2)
        return Source(spec, str(place), loaded.get, list(loaded), place, missed=missed)
    tried = "".join(f"\n  {line}" for line in missed) or "\n  no copy on the hub is known"
    raise DatasetNotFoundError(
        f"{spec.name} cannot be had from the hub:{tried}\nOr set the data module's `source` to a local copy: "
        f"{spec.schema}."
    ) from last


def _open_local(spec: DatasetSpec, source: str) -> Source:
    path = Path(resolve_source(source)).expanduser()
    if not path.exists():
        raise DatasetNotFoundError(f"{spec.name}: {path} is not there. Set `source` to {spec.schema}.")
    local = LocalData(path, spec)
    return Source(spec, str(path), local.load, local.names, note=stand_in_note(path))


def is_path(source: str) -> bool:
    """Return whether a source is meant as a path, there or not."""
    if source.startswith((PACKAGE_SCHEME, ".", "/", "~")) or "\\" in source or Path(source).exists():
        return True
    repository = source.partition("@")[0]  # a revision may have slashes of its own
    return repository.count("/") != 1 or Path(source).suffix.lower() in BUILDERS


def _place(spec: DatasetSpec, source: str) -> Place:
    match = re.fullmatch(r"(?P<id>[^/:@]+/[^/:@]+)(:(?P<config>[^@]+))?(@(?P<revision>.+))?", source)
    if match is None:
        raise ConfigError(
            f"{spec.name}: source '{source}' is neither a path nor a hub id owner/name[:config][@revision]."
        )
    known = next((place for place in spec.places if place.id == match["id"]), Place(match["id"]))
    return Place(known.id, match["config"] or known.config, match["revision"] or known.revision, splits=known.splits)
