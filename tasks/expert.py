"""Expert folders: a PEFT adapter, the task's head, and ``expert.json``, which says what they are and how good."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from nscmerge.adapters import Adapter, load_adapter, write_adapter
from nscmerge.base_model import resolve_source
from nscmerge.folders import new_folder
from tasks.base import Task

CARD = "expert.json"


@dataclass(frozen=True)
class ExpertCard:
    """What ``expert.json`` holds.

    Attributes:
        name: Of the expert.
        task: ``class_path`` and ``init_args`` of its :class:`Task`.
        head: Shape of every head tensor.
        base_model: ``id`` and ``sha256`` of the weights (None where they were not local files).
        metric: ``primary`` key and ``higher_is_better``.
        scores: Metric values per split, measured with the weights as written.
        data: What the data module says of itself: what they are, how many, which lists.
        training: Options that made it.
        versions: Of the libraries that made it, and the git commit of ours where it is known.
        notes: What must be known of how the scores were measured.
    """

    name: str
    task: dict[str, Any]
    head: dict[str, list[int]]
    base_model: dict[str, str | None]
    metric: dict[str, Any]
    scores: dict[str, dict[str, float]]
    data: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a fine-tuning depends on, and our git commit in a checkout."""
    found = {}
    for package in ("nscmerge", "torch", "lightning", "peft", "transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """Return the commit that is checked out where this file lies, or None where it is no checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def seed() -> int | None:
    """Return the seed that Lightning was told, or None."""
    told = os.environ.get("PL_GLOBAL_SEED")
    return int(told) if told is not None else None


def described(data: LightningDataModule | None) -> dict[str, Any]:
    """Return what a data module says of its data, if it has a ``describe`` of its own, and its name."""
    if data is None:
        return {}
    name = f"{type(data).__module__}.{type(data).__qualname__}"
    return {"class_path": name, **(data.describe() if hasattr(data, "describe") else {})}


def head_shapes(task: Task) -> dict[str, list[int]]:
    """Return the shape of every tensor of a task's head."""
    return {name: list(tensor.shape) for name, tensor in task.state_dict().items()}


def card_of(
    task: Task,
    name: str,
    base_model: dict[str, str | None],
    scores: dict[str, dict[str, float]],
    data: LightningDataModule | None,
    training: dict[str, Any],
) -> ExpertCard:
    """Return the card of a task's expert; arguments as the attributes of :class:`ExpertCard`."""
    return ExpertCard(
        name=name,
        task=task.config(),
        head=head_shapes(task),
        base_model=base_model,
        metric={"primary": task.primary, "higher_is_better": task.higher_is_better},
        scores=scores,
        data=described(data),
        training=training,
        versions=versions(),
        notes=task.notes(),
    )


def write_expert(adapter: Adapter, card: ExpertCard, folder: str | Path) -> None:
    """Write an expert folder, whole or not at all.

    Raises:
        OutputExistsError: The folder is there already.
    """
    with new_folder(folder) as partial:
        write_adapter(adapter, partial)
        (partial / CARD).write_text(json.dumps(card.__dict__, indent=2) + "\n", encoding="utf-8")


def read_expert(source: str | Path, name: str) -> tuple[Adapter, Mapping[str, Tensor]]:
    """Return an expert's adapter and head; the head is empty where the task has none, as generation.

    Args:
        source: Its folder, or ``package:NAME/FOLDER``.
        name: Of its task, for messages.

    Raises:
        AdapterError: There is no adapter.
    """
    adapter = load_adapter(resolve_source(str(source)), name=name)
    return adapter, adapter.head
