"""Label-free batches of all tasks at once: what a step draws depends on the step and the seed, nothing else."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from datamodules.base import Sample, TaskKey, collate, size_of, without_target

#: Inputs of every task, by task name, then by input name; of tasks that share them by the tuple of their names.
JointBatch = dict[TaskKey, Sample]


def stable_seed(*parts: object) -> int:
    """Return 63 bits that depend on ``parts`` alone, unlike ``hash``, which differs from process to process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(seed: int, task: TaskKey, number: int, size: int) -> Tensor:
    """Return the order, int64 (size,), in which a task's samples come in one of its passes."""
    name = task if isinstance(task, str) else task[0]
    return torch.randperm(size, generator=torch.Generator().manual_seed(stable_seed(seed, name, number)))


class JointBatches(IterableDataset[JointBatch], ABC):
    """Batches ``{task: inputs}``, numbered by step; loader worker w of n yields steps w, w + n, ...

    Args:
        datasets: One data set per task, or per tuple of tasks that share it; labels are dropped here, whoever passes
            them in.
        batch_size: Samples per task and step over all processes.
        rank: This process.
        world_size: Number of processes; process r takes every ``world_size``-th sample of a step, from r on.
    """

    def __init__(
        self, datasets: Mapping[TaskKey, Dataset[Sample]], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.datasets = {task: without_target(dataset) for task, dataset in datasets.items()}
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    @abstractmethod
    def indices(self, task: TaskKey, step: int) -> list[int]:
        """Return the samples of ``task`` that all processes together draw at ``step``."""

    @abstractmethod
    def steps(self) -> Iterator[int]:
        """Return the numbers of the steps, in order."""

    def batch(self, step: int) -> JointBatch:
        """Return this process's share of one step; a task that has run out is left out."""
        shares = {task: self.indices(task, step)[self.rank :: self.world_size] for task in self.datasets}
        return {task: collate([self.datasets[task][i] for i in share]) for task, share in shares.items() if share}

    def __iter__(self) -> Iterator[JointBatch]:
        worker = get_worker_info()
        first, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.batch, itertools.islice(self.steps(), first, None, count))


class EndlessStream(JointBatches):
    """Endless shuffled passes: task k's step t takes positions t b .. t b + b - 1 of a sequence of permutations.

    Pass p of a task is a fresh permutation seeded by (seed, task name, p), so step t draws the same samples on any
    number of processes and workers and wherever a run was resumed, and adding a task does not change the others.
    Tasks that share their inputs draw once for all of them, what the first of them would draw alone.
    """

    def __init__(
        self,
        datasets: Mapping[TaskKey, Dataset[Sample]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(datasets, batch_size, rank, world_size)
        self.seed, self.start = seed, start
        self._order: dict[TaskKey, tuple[int, Tensor]] = {}  # the pass that each task is in

    def steps(self) -> Iterator[int]:
        """Return all steps from ``start`` on."""
        return itertools.count(self.start)

    def indices(self, task: TaskKey, step: int) -> list[int]:
        """Return ``batch_size`` samples; those of two passes where the step lies across their border."""
        size = size_of(self.datasets[task])
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._permutation(task, size, p // size)[p % size]) for p in positions]

    def _permutation(self, task: TaskKey, size: int, number: int) -> Tensor:
        if self._order.get(task, (-1,))[0] != number:
            self._order[task] = number, permutation(self.seed, task, number, size)
        return self._order[task][1]


class SequentialBatches(JointBatches):
    """The first ``samples`` of every task, once and in order, ``batch_size`` per task, step and process."""

    def __init__(
        self,
        datasets: Mapping[TaskKey, Dataset[Sample]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        samples: int = 64,
    ) -> None:
        super().__init__(datasets, batch_size * world_size, rank, world_size)
        self.sizes = {task: min(samples, size_of(data)) for task, data in self.datasets.items()}

    def steps(self) -> Iterator[int]:
        """Return the steps until every task has run out."""
        return iter(range(len(self)))

    def indices(self, task: TaskKey, step: int) -> list[int]:
        """Return the next samples in order, fewer or none at the end."""
        last = min((step + 1) * self.batch_size, self.sizes[task])
        return list(range(step * self.batch_size, last))

    def __len__(self) -> int:
        # Some process may have an empty last step; it must not have one step fewer than it says.
        mine = (len(range(self.rank, size, self.world_size)) for size in self.sizes.values())
        return -(-max(mine, default=0) // (self.batch_size // self.world_size))


class StreamLoader(DataLoader[JointBatch]):
    """Loader of an :class:`EndlessStream` that asks where to start each time it is iterated.

    Lightning iterates once per epoch and after a restored checkpoint; asking then, not when the loader is made, keeps
    step and samples together in both cases.
    """

    def __init__(self, stream: EndlessStream, start: Callable[[], int] | None = None, **options: Any) -> None:
        super().__init__(stream, batch_size=None, **options)
        self.start = start

    def __iter__(self) -> Any:
        if self.start is not None:
            self.dataset.start = self.start()  # type: ignore[attr-defined]
        return super().__iter__()
