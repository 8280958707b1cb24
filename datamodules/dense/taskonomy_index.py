"""Which views of which buildings there are: the split file, and the domains joined by building, point and view."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from datamodules.base import Split
from nscmerge.errors import DataError, DatasetNotFoundError

SPLIT_FILE = "splits_taskonomy/train_val_test_tiny.csv"


def read_buildings(root: Path, dataset: str) -> dict[Split, list[str]]:
    """Return the buildings of each split, in the order of the split file.

    Raises:
        DatasetNotFoundError: The file is missing.
        DataError: It has other columns, or a building that is not in exactly one split.
    """
    file = root / SPLIT_FILE
    try:
        rows = [row for row in csv.reader(file.read_text("utf-8").splitlines()) if row]
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"{dataset}: {file} is missing. It is in splits_taskonomy.zip of the Taskonomy repository (data/assets)."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{dataset}: {file} is not a text file ({error}).") from error
    columns: list[Split] = ["train", "val", "test"]
    if not rows or [name.strip() for name in rows[0]] != ["id", *columns]:
        raise DataError(f"{dataset}: {file} has the columns {rows[0] if rows else []}; expected id, train, val, test.")
    splits: dict[Split, list[str]] = {split: [] for split in columns}
    seen: set[str] = set()
    for number, row in enumerate(rows[1:], 2):
        building, *flags = (cell.strip() for cell in row)
        if sorted(flags) != ["0", "0", "1"] or not building or building in seen:
            raise DataError(
                f"{dataset}: line {number} of {file} is {','.join(row)}; expected a building, once, and 1 for exactly "
                "one of train, val, test, else 0."
            )
        seen.add(building)
        splits[columns[flags.index("1")]].append(building)
    return splits


def domain_folder(root: Path, domain: str) -> Path:
    """Return where a domain's buildings are: ``<domain>/taskonomy`` (Omnidata) or ``<domain>`` (MultiMAE)."""
    nested = root / domain / "taskonomy"
    return nested if nested.is_dir() else root / domain


def view_file(folder: Path, building: str, view: str, domain: str) -> Path:
    """Return the file of a view such as ``point_3_view_0``."""
    return folder / building / f"{view}_domain_{domain}.png"


def views(folder: Path, building: str, domain: str, dataset: str) -> set[str]:
    """Return the views of one building that a domain has, such as ``point_3_view_0``.

    Raises:
        DatasetNotFoundError: The building is missing.
        DataError: A PNG in its folder belongs to another domain, or is no view at all.
    """
    end = f"_domain_{domain}.png"
    try:
        names = os.listdir(folder / building)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetNotFoundError(
            f"{dataset}: building '{building}' is missing from the domain '{domain}': there is no folder "
            f"{folder / building}. Download it, or take it out of {SPLIT_FILE}."
        ) from error
    # One search over all names: there are millions of files.
    pattern = re.compile(rf"^(point_\d+_view_\d+){re.escape(end)}$", re.MULTILINE)
    images = [name for name in names if name.endswith(".png") and not name.startswith(".")]
    found = set(pattern.findall("\n".join(images)))
    if len(found) < len(images):
        odd = next(name for name in images if not pattern.match(name))
        raise DataError(
            f"{dataset}: {folder / building / odd} is not named point_<P>_view_<V>{end}; a file of another domain "
            "would be taken for this one's. Move it where it belongs."
        )
    return found


def _numbers(view: str) -> tuple[int, int]:
    _, point, _, number = view.split("_")
    return int(point), int(number)


def join_views(
    root: Path, buildings: Sequence[str], domains: Collection[str], dataset: str
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Return the views that every domain has, and how many each domain lacks of all that any has.

    Returns:
        (building, view) by the order of the buildings, point and view; and the counts by domain, zeros left out, with
        the number of dropped views under ``"views"`` if there are any.

    Raises:
        DatasetNotFoundError: A building is missing from a domain.
        DataError: A file is in another domain's folder.
    """
    folders = {domain: domain_folder(root, domain) for domain in domains}
    complete: list[tuple[str, str]] = []
    lacking = dict.fromkeys([*domains, "views"], 0)
    for building in buildings:
        have = {domain: views(folder, building, domain, dataset) for domain, folder in folders.items()}
        everything = set[str]().union(*have.values())
        shared = set.intersection(*have.values())
        complete += [(building, view) for view in sorted(shared, key=_numbers)]
        lacking["views"] += len(everything) - len(shared)
        for domain, found in have.items():
            lacking[domain] += len(everything) - len(found)
    return complete, {name: count for name, count in lacking.items() if count}
