"""The batches of many candidates, one after the other, as one loader: a Trainer's progress bar sees them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import IterableDataset

from nscmerge.batching import TaskKey, tasks_of
from nscmerge.search.criterion import Criterion
from nscmerge.search.hashes import tensors_sha256


class Candidate(NamedTuple):
    """One measurement: a method (or ``base``, ``expert``) at one scale by one criterion."""

    method: str
    criterion: str
    lam: float


class Work(NamedTuple):
    """One batch of one candidate; ``first`` and ``last`` say where the candidate begins and ends."""

    number: int
    tasks: tuple[str, ...]
    batch: dict[str, Any]
    first: bool
    last: bool


class Samples(NamedTuple):
    """What a criterion is measured on: number of batches, samples by task, and the hash of all tensors."""

    batches: int
    tasks: dict[str, int]
    sha256: str

    @classmethod
    def of(cls, criterion: Criterion, data: LightningDataModule) -> Samples:
        """Return what one pass over the batches of a criterion finds."""
        tasks: dict[str, int] = {}
        batches = 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal batches
            for key, batch in criterion.batches(data):
                batches += 1
                named = list(_named(key, batch))
                for task in tasks_of(key):
                    tasks[task] = tasks.get(task, 0) + len(named[0][1])
                yield from named

        sha256 = tensors_sha256(tensors())
        return cls(batches, tasks, sha256)


def _named(key: TaskKey, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch by name, labels of several tasks one by one."""
    owner = ", ".join(tasks_of(key))
    for name, value in sorted(batch.items()):
        if isinstance(value, Mapping):
            yield from ((f"{task}.{name}", _tensor(own)) for task, own in sorted(value.items()))
        else:
            yield f"{owner}.{name}", _tensor(value)


def _tensor(value: Any) -> Tensor:
    """Return a tensor as it is, and texts (accepted answers, one list per sample) as their bytes, (N, longest)."""
    if isinstance(value, Tensor):
        return value
    rows = [torch.tensor(list(json.dumps(own, default=str).encode()), dtype=torch.uint8) for own in value]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Plan(IterableDataset[Work]):
    """All batches of all candidates, candidate by candidate."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        criteria: Mapping[str, Criterion],
        samples: Mapping[str, Samples],
        data: LightningDataModule,
    ) -> None:
        super().__init__()
        self.candidates, self.criteria, self.samples, self.data = candidates, criteria, samples, data

    def __iter__(self) -> Iterator[Work]:
        for number, candidate in enumerate(self.candidates):
            last = self.samples[candidate.criterion].batches - 1
            for i, (key, batch) in enumerate(self.criteria[candidate.criterion].batches(self.data)):
                yield Work(number, tasks_of(key), batch, i == 0, i == last)

    def __len__(self) -> int:
        return sum(self.samples[candidate.criterion].batches for candidate in self.candidates)
