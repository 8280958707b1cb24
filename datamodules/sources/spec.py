"""What a data set is, as published: where it lies, what its columns and splits are called, how a split is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.base import Split
from datamodules.sources.splits import Cut
from nscmerge.errors import ConfigError

#: Names of one column or split, the one to prefer first.
Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """How one of our splits is made from a published one.

    Attributes:
        names: What the published split is called, alternatives in order.
        where: ``(our column, value)``: only rows with it, for data that keep all splits in one.
        cut: Divides the rows that are left in two; None keeps them all.
        side: Which part of the cut is ours: 0 the first (``train_test_split``'s "train"), 1 the second ("test").
    """

    names: Names
    where: tuple[str, Any] | None = None
    cut: Cut | None = None
    side: int = 0

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The names, as a tuple."""
        return as_tuple(self.names)


@dataclass(frozen=True)
class Place:
    """One copy of a data set on the hub.

    Attributes:
        id: ``owner/name``.
        config: Configuration, if it has several.
        revision: Branch, tag or commit; ``refs/convert/parquet`` for data that came with a loading script.
        splits: Parts of this copy that differ from :attr:`DatasetSpec.splits`.
    """

    id: str
    config: str | None = None
    revision: str | None = None
    splits: Mapping[Split, Part] = field(default_factory=dict)

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return self.id + config + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class DatasetSpec:
    """One task's data set.

    Attributes:
        name: What messages call it.
        places: Copies on the hub, tried in order.
        columns: ``{our name: names in the data}``, the first that is there counts.
        splits: How each of our splits is made; one that is left out does not exist.
        optional: Our columns that a copy may lack.
        header: Names of the columns of csv and tsv files whose first line is no header; None: every file has one.
    """

    name: str
    places: Sequence[Place]
    columns: Mapping[str, Names]
    splits: Mapping[Split, Part]
    optional: frozenset[str] = frozenset()
    header: tuple[str, ...] | None = None

    @property
    def schema(self) -> str:
        """What a local copy must look like, in words."""
        splits = "; ".join(
            " or ".join(dict.fromkeys(part.alternatives)) + f" (for {split})" for split, part in self.splits.items()
        )
        columns = ", ".join(
            " | ".join(as_tuple(names)) + (" (optional)" if ours in self.optional else "")
            for ours, names in self.columns.items()
        )
        return (
            "a folder written by save_to_disk, or one of parquet, json, jsonl, csv or tsv files named after the splits "
            f"{splits}, with the columns {columns}"
        )

    def part(self, split: Split, place: Place | None = None) -> Part:
        """Return how a split is made.

        Raises:
            ConfigError: The data set has no such split.
        """
        own = place.splits if place else {}
        if split in own:
            return own[split]
        if split not in self.splits:
            raise ConfigError(f"{self.name} has no split '{split}'; it has {', '.join(self.splits)}.")
        return self.splits[split]


def as_tuple(names: Names) -> tuple[str, ...]:
    """Return names as a tuple, a single one too."""
    return (names,) if isinstance(names, str) else names
