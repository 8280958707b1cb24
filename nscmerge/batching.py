"""Fuse the tasks' inputs into as few batches as their shapes allow, remembering whose rows are whose.

A batch is ``{task: inputs}``; where tasks share their inputs the key is the tuple of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nscmerge.errors import ConfigError

Inputs = Mapping[str, Tensor]
MASK = "attention_mask"
#: Whose inputs they are: one task's, or those of several tasks that share them.
TaskKey = str | tuple[str, ...]
Key = TypeVar("Key", bound=TaskKey)


def tasks_of(key: TaskKey) -> tuple[str, ...]:
    """Return the tasks that a key of a batch names."""
    return (key,) if isinstance(key, str) else tuple(key)


@dataclass(frozen=True)
class Group:
    """One fused batch: keyword arguments of the model, each task's rows, and which tokens are valid.

    Attributes:
        inputs: ``{argument: (N, ...)}``; rows of all its tasks, padded to one length.
        rows: ``{task: slice of N}``, contiguous; tasks that share their inputs have the same rows.
        mask: bool (N, T) from the attention mask, or None where every token counts.
    """

    inputs: dict[str, Tensor]
    rows: dict[str, slice]
    mask: Tensor | None

    @property
    def owners(self) -> list[tuple[slice, list[str]]]:
        """Every distinct run of rows, and the tasks whose rows they are."""
        found: dict[tuple[int, int], list[str]] = {}
        for task, rows in self.rows.items():
            found.setdefault((rows.start, rows.stop), []).append(task)
        return [(slice(*span), tasks) for span, tasks in found.items()]

    @property
    def shared(self) -> bool:
        """Whether some rows belong to several tasks."""
        return len(self.owners) < len(self.rows)

    def part(self, rows: slice | Tensor) -> dict[str, Tensor]:
        """Return the inputs of some rows, without the tokens at either end that are padding in all of them."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        if self.mask is None or not (valid := self.mask[rows].any(0)).any():
            return inputs
        places = valid.nonzero()
        first, last = int(places[0]), int(places[-1])
        ragged = _ragged(self.inputs)
        return {name: value[:, first : last + 1] if name in ragged else value for name, value in inputs.items()}


def fuse(batch: Mapping[Key, Inputs]) -> list[Group]:
    """Return the groups of one multi-task batch, in the order in which their first tasks stand.

    Tasks share a group when their inputs have the same names, dtypes and shapes, sequence length aside where an
    attention mask says which tokens are padding.

    Args:
        batch: ``{task: inputs}``, or ``{(task, task, ...): inputs}`` for tasks that share their inputs.

    Raises:
        ConfigError: An input is no tensor, a task's inputs differ in batch size, the batch still holds a target, or a
            task stands in it twice.
    """
    named = [task for key in batch for task in tasks_of(key)]
    if twice := sorted({task for task in named if named.count(task) > 1}):
        raise ConfigError(f"the batch holds inputs of {', '.join(twice)} twice; a task belongs to one key of a batch.")
    groups: dict[tuple[object, ...], dict[TaskKey, Inputs]] = {}
    for key, inputs in batch.items():
        groups.setdefault(_signature(", ".join(tasks_of(key)), inputs), {})[key] = inputs
    return [_fuse_group(group) for group in groups.values()]


def by_length(group: Group, buckets: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return ``(rows, inputs)`` of at most ``buckets`` nearly equal parts, short samples first, common padding cut off.

    ``rows`` is int64 on the CPU and says which rows of the group a part holds. One part is the whole group, in order.
    """
    size = len(next(iter(group.inputs.values())))
    if buckets == 1 or group.mask is None:
        return [(torch.arange(size), group.inputs)]
    order = group.mask.sum(1).argsort(stable=True).cpu()
    return [(rows, group.part(rows)) for rows in order.tensor_split(min(buckets, size))]


def _signature(task: str, inputs: Inputs) -> tuple[object, ...]:
    if not isinstance(inputs, Mapping) or not inputs:
        raise ConfigError(f"task '{task}': the batch is {type(inputs).__name__}; expected {{input name: tensor}}.")
    if "target" in inputs or "labels" in inputs:
        raise ConfigError(f"task '{task}': the batch holds labels; a merge learns from inputs alone. Drop them.")
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise ConfigError(f"task '{task}': input '{name}' is {type(value).__name__}; expected a batched tensor.")
    if len({len(v) for v in inputs.values()}) != 1:
        sizes = {n: len(v) for n, v in inputs.items()}
        raise ConfigError(f"task '{task}': inputs differ in batch size: {sizes}.")
    ragged = _ragged(inputs)
    return tuple(
        (name, value.dtype, tuple(value.shape[2:]) if name in ragged else tuple(value.shape[1:]))
        for name, value in sorted(inputs.items())
    )


def _ragged(inputs: Inputs) -> set[str]:
    """Names of the inputs that run along the tokens of the attention mask, and so can be padded."""
    if MASK not in inputs or inputs[MASK].ndim != 2:
        return set()
    return {name for name, value in inputs.items() if value.shape[:2] == inputs[MASK].shape}


def _fuse_group(group: Mapping[TaskKey, Inputs]) -> Group:
    rows: dict[str, slice] = {}
    start = 0
    for key, inputs in group.items():
        size = len(next(iter(inputs.values())))
        rows |= dict.fromkeys(tasks_of(key), slice(start, start + size))
        start += size
    fused = {}
    first = next(iter(group.values()))
    ragged = set.intersection(*(_ragged(inputs) for inputs in group.values()))
    for name in first:
        parts = [inputs[name] for inputs in group.values()]
        if name in ragged:
            length = max(p.shape[1] for p in parts)
            # Right padding with 0 is safe whatever the tokenizer: the attention mask is padded alike.
            parts = [_pad(p, length) for p in parts]
        fused[name] = torch.cat(parts)
    mask = fused.get(MASK)
    return Group(fused, rows, mask.bool() if mask is not None and mask.ndim == 2 else None)


def _pad(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing)) if missing else tensor
