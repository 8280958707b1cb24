"""Finished candidates, one JSON line each, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from nscmerge.errors import ConfigError
from nscmerge.search.criterion import TaskValues

#: ``{curve suffix: {task: value}}`` of one candidate.
Measured = dict[str, TaskValues]


class Journal:
    """Measured candidates by (key, scale), kept in a file, every line flushed to disk.

    A key is the hash of everything that a value depends on, so lines of other settings are simply not found: a search
    can be resumed with more methods, other criteria or another grid.

    Args:
        path: Working file; None keeps everything in memory.

    Raises:
        ConfigError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[tuple[str, float], Measured] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        # A killed process may leave half a line at the end; what follows must not be glued to it.
        whole, _, torn = text.rpartition("\n")
        if torn:
            os.truncate(path, len((whole + "\n").encode()) if whole else 0)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                curves = {c: {t: float(v) for t, v in tasks.items()} for c, tasks in entry["curves"].items()}
                self._found[entry["key"], entry["lam"]] = curves
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}, is no finished candidate ({type(error).__name__}: {error}). Delete that "
                    "line, or the file to start anew."
                ) from error

    def get(self, key: str, lam: float) -> Measured | None:
        """Return what was measured, or None."""
        return self._found.get((key, lam))

    def add(self, key: str, lam: float, measured: Measured, method: str, criterion: str) -> None:
        """Keep a candidate; the names of method and criterion are for whoever reads the file."""
        self._found[key, lam] = measured
        if self.path is None:
            return
        curves = {c: {t: _json(v) for t, v in tasks.items()} for c, tasks in measured.items()}
        line = {"key": key, "method": method, "criterion": criterion, "lam": lam, "curves": curves}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the working file: the results stand somewhere else."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _json(value: float) -> float | str:
    """Non-finite numbers as text, which JSON can hold."""
    return value if math.isfinite(value) else repr(value)
