"""The batches of many candidates, one after the other, as one loader: a Trainer's progress bar sees them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import IterableDataset

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
    task: str
    batch: dict[str, Tensor]
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
            for task, batch in criterion.batches(data):
                batches += 1
                tasks[task] = tasks.get(task, 0) + len(next(iter(batch.values())))
                yield from ((f"{task}.{name}", tensor) for name, tensor in sorted(batch.items()))

        sha256 = tensors_sha256(tensors())
        return cls(batches, tasks, sha256)


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
            for i, (task, batch) in enumerate(self.criteria[candidate.criterion].batches(self.data)):
                yield Work(number, task, batch, i == 0, i == last)

    def __len__(self) -> int:
        return sum(self.samples[candidate.criterion].batches for candidate in self.candidates)
