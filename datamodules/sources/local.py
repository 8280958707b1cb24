"""Data sets on disk: what ``save_to_disk`` wrote, table files named after their splits, folders of images."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources.spec import DatasetSpec, as_tuple
from nscmerge.errors import DataError, DatasetNotFoundError

#: Table files by suffix: the builder of `datasets` that reads them, and its options.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    # "None" and "null" are words here, and quotes of tab separated texts are their own.
    ".csv": ("csv", {"keep_default_na": False, "na_filter": False}),
    ".tsv": ("csv", {"keep_default_na": False, "na_filter": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".txt": ("csv", {"keep_default_na": False, "na_filter": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
}
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
#: A text file of this name beside the data says that they are a stand-in, and for what.
STAND_IN = "STAND_IN.txt"
#: Files that describe a data set and are none of its splits.
_ASIDE = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "license.txt"})
_SHARD = r"(-\d+-of-\d+(-[0-9a-f]+)?)?"


class LocalData:
    """The splits that a folder or file holds; each is read when it is asked for.

    Args:
        path: A folder or a table file.
        spec: What to expect in it.
    """

    def __init__(self, path: Path, spec: DatasetSpec) -> None:
        self.path, self.spec = path, spec
        self.root = _config_folder(path, spec) if path.is_dir() else path.parent
        self._saved = _saved(self.root) if path.is_dir() else {}
        files = sorted(self.root.rglob("*")) if path.is_dir() else [path]
        self._tables = [f for f in files if f.suffix.lower() in BUILDERS and _is_table(f)]

    @property
    def names(self) -> list[str]:
        """What is there, for messages: names of saved splits, else of files and folders."""
        inside = [f.relative_to(self.root).as_posix() for f in self._tables]
        folders = [f.name for f in sorted(self.root.iterdir()) if f.is_dir()] if self.path.is_dir() else []
        return list(self._saved) or inside[:20] or folders[:20]

    def load(self, name: str) -> Any | None:
        """Return the ``datasets.Dataset`` of a published split, None where there is no such split.

        Raises:
            DataError: Its files cannot be read, or are of several formats.
        """
        if self._saved:
            return _load_saved(self._saved[name], name) if name in self._saved else None
        folder = self.root / name
        if folder.is_dir() and any(f.suffix.lower() in IMAGES for f in folder.rglob("*")):
            return self._build("imagefolder", name, [folder], data_dir=str(folder))
        files = self._files(name)
        if not files:
            return None
        if len(kinds := sorted({f.suffix.lower() for f in files})) > 1:
            raise DataError(
                f"{self.spec.name}: {self.root} holds the split '{name}' as {' and as '.join(kinds)}; keep one of them."
            )
        builder, options = BUILDERS[kinds[0]]
        if builder == "csv" and self.spec.header and not self._has_header(files[0], options.get("sep", ",")):
            options = {**options, "column_names": list(self.spec.header)}
        return self._build(builder, name, files, data_files={name: [str(f) for f in files]}, **options)

    def _files(self, name: str) -> list[Path]:
        """Files of a split: those in a folder of its name or called so, else those whose name ends in it."""
        exact = re.compile(f"{re.escape(name)}{_SHARD}")
        inside = [f for f in self._tables if name in f.relative_to(self.root).parts[:-1] or exact.fullmatch(f.stem)]
        ending = re.compile(f".*[_.-]{re.escape(name)}{_SHARD}")
        return inside or [f for f in self._tables if ending.fullmatch(f.stem)]

    def _has_header(self, file: Path, separator: str) -> bool:
        with file.open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline().rstrip("\r\n").split(separator)
        return bool({name for names in self.spec.columns.values() for name in as_tuple(names)} & set(first))

    def _build(self, builder: str, name: str, files: Sequence[Path], **options: Any) -> Any:
        from datasets import DatasetDict, load_dataset

        try:
            built = load_dataset(builder, **options)
        except Exception as error:  # whatever the parsers raise: the file is at fault, and is named
            shown = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            raise DataError(
                f"{self.spec.name}: {shown} cannot be read as {builder}: {cause(error)}. Expected {self.spec.schema}."
            ) from error
        return built[name if name in built else next(iter(built))] if isinstance(built, DatasetDict) else built


def stand_in_note(path: Path) -> str | None:
    """Return what the data in a folder say that they stand in for, None where they say nothing."""
    for folder in (path, *path.parents[:1]):
        if (file := folder / STAND_IN).is_file():
            return file.read_text("utf-8").strip()
    return None


def cause(error: BaseException) -> str:
    """Return the innermost reason of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _config_folder(path: Path, spec: DatasetSpec) -> Path:
    """A folder that mirrors a hub repository keeps each configuration in a folder of its name."""
    configs: Iterable[str] = dict.fromkeys(place.config for place in spec.places if place.config)
    return next((path / config for config in configs if (path / config).is_dir()), path)


def _saved(root: Path) -> dict[str, Path]:
    """Folders that save_to_disk wrote, by split."""
    if (root / "state.json").is_file():
        from datasets import load_from_disk

        split = load_from_disk(str(root)).split
        if split is None:
            raise DatasetNotFoundError(
                f"{root} is one saved split without a name; save a DatasetDict that names it, "
                "or put it in a folder named after the split."
            )
        return {str(split): root}
    return {f.parent.name: f.parent for f in sorted(root.glob("*/state.json"))}


def _load_saved(folder: Path, name: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # arrow and json errors of a damaged folder
        raise DataError(
            f"{folder}: the saved split '{name}' cannot be read: {cause(error)}. Write it again."
        ) from error


def _is_table(file: Path) -> bool:
    return file.is_file() and file.name.lower() not in _ASIDE and file.name not in (STAND_IN, "README.txt")
