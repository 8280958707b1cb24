"""Split lists: reading, hashing and halving them, and checking that every listed id has its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nscmerge.errors import DataError, DatasetNotFoundError

#: Folders that may hold an id's file, relative to the root, and the file's suffix; one of the folders suffices.
Place = tuple[tuple[str, ...], str]


def list_hash(ids: Iterable[str]) -> str:
    """Return the SHA-256 of a list: its ids sorted, one and a newline each. The order of the list does not matter."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def read_ids(file: Path, dataset: str, remedy: str = "") -> list[str]:
    """Return the ids of a list file, one a line, in its order.

    Args:
        file: The list.
        dataset: Name of the data set, for messages.
        remedy: What to do if the list is missing.

    Raises:
        DatasetNotFoundError: The file is missing.
        DataError: It holds no id, or one twice.
    """
    try:
        ids = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        hint = remedy or "Set data.init_args.root to the folder that holds it."
        raise DatasetNotFoundError(f"{dataset}: {file} is missing. {hint}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{dataset}: {file} is not a text file ({error}); expected one id a line.") from error
    if not ids:
        raise DataError(f"{dataset}: {file} holds no id; expected one a line.")
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise DataError(f"{dataset}: {file} holds '{twice}' twice; every id must occur once.")
    return ids


def check_list(file: Path, dataset: str, ids: Sequence[str], count: int | None, sha256: str | None) -> None:
    """Raise unless a list is the published one.

    Args:
        file: Where it was read, for messages.
        dataset: Name of the data set, for messages.
        ids: What it holds.
        count: How many ids the published list has; None takes any number.
        sha256: How the hash of the published list starts (see :func:`list_hash`); None takes any.

    Raises:
        DatasetNotFoundError: Count or hash differ; names both.
    """
    if count is not None and len(ids) != count:
        raise DatasetNotFoundError(
            f"{dataset}: {file} holds {len(ids)} ids, the published list {count}. Use the published list."
        )
    got = list_hash(ids)
    if sha256 is not None and not got.startswith(sha256):
        raise DatasetNotFoundError(
            f"{dataset}: the sorted ids of {file} have SHA-256 {got[:16]}..., the published list starts with {sha256}. "
            "Scores on other images cannot be compared; use the published list."
        )


def check_disjoint(dataset: str, lists: Mapping[str, Sequence[str]]) -> None:
    """Raise if an id is in two lists.

    Raises:
        DataError: It is; names the id and both lists.
    """
    owner: dict[str, str] = {}
    for name, ids in lists.items():
        for i in ids:
            if i in owner:
                raise DataError(f"{dataset}: '{i}' is in both {owner[i]} and {name}; no image may be in two splits.")
            owner[i] = name


def halves(ids: Iterable[str], seed: int) -> tuple[list[str], list[str]]:
    """Return two random halves of a list, the smaller first; whatever the list's order, they are the same."""
    order: list[str] = np.random.default_rng(seed).permutation(sorted(ids)).tolist()
    return order[: len(order) // 2], order[len(order) // 2 :]


def stems(folder: Path, suffix: str) -> set[str]:
    """Return the names in a folder that end with ``suffix``, without it; none where there is no such folder."""
    try:
        return {name[: -len(suffix)] for name in os.listdir(folder) if name.endswith(suffix)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def check_present(dataset: str, root: Path, lists: Mapping[str, Sequence[str]], places: Sequence[Place]) -> None:
    """Raise unless every id of every list has all its files; reads folders, not files.

    Args:
        dataset: Name of the data set, for messages.
        root: Its folder.
        lists: Ids by where they come from.
        places: What each id must have.

    Raises:
        DatasetNotFoundError: Something is missing; says what, how often, and for which id first.
    """
    for folders, suffix in places:
        have = set[str]().union(*(stems(root / folder, suffix) for folder in folders))
        for name, ids in lists.items():
            missing = [i for i in ids if i not in have]
            if missing:
                files = " or ".join(f"{folder}/{missing[0]}{suffix}" for folder in folders)
                raise DatasetNotFoundError(
                    f"{dataset}: {len(missing)} of {len(ids)} ids of {name} have no file; {root} lacks {files}, say."
                    " Set data.init_args.root to the whole data set, or correct the list."
                )
