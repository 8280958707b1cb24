"""What one method did on one order, written after every step so that an interrupted protocol goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nscmerge.errors import ConfigError

#: Version of the files.
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One step.

    Args:
        task: The one that arrived.
        scores: Primary metric of every task seen so far, in its own unit.
        seconds: Wall time of the merge alone: no reading, no test.
        parameters: Numbers in the merge: of factors, or of dense tensors.
        losses: Stability and plasticity by name, where measured.
    """

    task: str
    scores: Mapping[str, float]
    seconds: float
    parameters: int
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One method on one order.

    Args:
        name: What the tables call the method.
        method: Its name in :data:`nscmerge.continual.METHODS`.
        variant: Which.
        options: All of its options.
        order: Tasks in order.
        rows: Steps so far.
        notes: Sentences of the method about the last step.
    """

    name: str
    method: str
    variant: str
    options: Mapping[str, Any]
    order: Sequence[str]
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether all tasks have arrived."""
        return len(self.rows) == len(self.order)


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write a file whole or not at all; numbers that are not finite become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a file that :func:`write_json` wrote.

    Raises:
        ConfigError: It is damaged, or of a newer version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}); remove it, and its part of the protocol runs again.") from None
    if version > FORMAT:
        raise ConfigError(f"{file} has format {version}; this version reads up to {FORMAT}. Update nscmerge.")
    return dict(content)


def write_run(run: Run, file: Path) -> None:
    """Write one run."""
    write_json({"format": FORMAT, **asdict(run)}, file)


def read_run(file: Path) -> Run:
    """Return one run; raises as :func:`read_json`."""
    content = read_json(file)
    rows = [
        Row(**{**row, "scores": _numbers(row["scores"]), "losses": _numbers(row["losses"])}) for row in content["rows"]
    ]
    return Run(**{**{k: v for k, v in content.items() if k != "format"}, "rows": rows})


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in values.items()}
