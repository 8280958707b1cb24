"""All tasks of a suite as one data module: label-free for fit and validate, labelled task by task for test."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.base import Sample, Split, TaskDataModule, TaskKey, evaluation_loader, evenly_spaced, size_of
from datamodules.shared import SharedDataset, check_pool, pools
from datamodules.stream import EndlessStream, JointBatch, SequentialBatches, StreamLoader, permutation
from nscmerge.errors import ConfigError


class JointDataModule(LightningDataModule):
    """Joins tasks: fit and validate yield ``{task: inputs}`` without labels, test has one labelled loader per task.

    With ``share_batches``, tasks whose data modules state the same ``pool`` are served by one set of inputs: the key of
    a batch is then the tuple of their names, and a labelled batch holds ``{"target": {task: tensor}}``.

    Args:
        tasks: One data module per task, by task name.
        batch_size: Samples per task and training step, over all processes together.
        split: Where fit and validate read their unlabelled inputs; the papers use the validation split.
        val_samples: The null-space ratio is reported on the first so many of that split, per task.
        test_batch_size: Samples per test batch.
        test_samples: Test on at most so many per task, evenly spaced over the split; None takes all.
        num_workers: Loader processes; the samples of a step do not depend on it.
        seed: Order in which samples are drawn.
        val_seed: Which samples ``val_samples``, and limits on a labelled split other than test, take: a seeded draw.
            None takes the first, or evenly spaced ones.
        share_batches: Serve tasks of equal inputs together: one forward pass instead of one per task, as Algorithm 1 of
            NSC has it.
        fit_samples: Learn from so few samples of each task, the first of its shuffled split; None takes all. Which ones
            depends on ``seed`` and the task's name, and fewer are the first of more; a larger batch repeats them.
            Validation keeps the whole split.
        note: What every result made from these data says of them; None takes what the tasks' data call themselves.

    Raises:
        ConfigError: No task, a task without a name, or a size below 1.
    """

    def __init__(
        self,
        tasks: dict[str, TaskDataModule],
        batch_size: int = 8,
        split: Split = "val",
        val_samples: int = 64,
        test_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_seed: int | None = None,
        test_samples: int | None = None,
        share_batches: bool = False,
        fit_samples: int | None = None,
        note: str | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("no tasks given to JointDataModule; state at least one under data.init_args.tasks.")
        for name in tasks:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"task name {name!r} is not a non-empty string; name it under data.init_args.tasks.")
        for option, value in {
            "batch_size": batch_size,
            "val_samples": val_samples,
            "test_batch_size": test_batch_size,
            "test_samples": 1 if test_samples is None else test_samples,
            "fit_samples": 1 if fit_samples is None else fit_samples,
        }.items():
            if value < 1:
                raise ConfigError(f"data.init_args.{option} is {value}; it must be at least 1.")
        self.tasks, self.batch_size, self.split = dict(tasks), batch_size, split
        self.val_samples, self.test_batch_size, self.test_samples = val_samples, test_batch_size, test_samples
        self.num_workers, self.seed, self.val_seed = num_workers, seed, val_seed
        self.share_batches, self.fit_samples, self._note = share_batches, fit_samples, note

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return list(self.tasks)

    @property
    def batch_keys(self) -> list[TaskKey]:
        """Whose inputs a batch holds, in the order of the test loaders: a task, or tasks that share their inputs."""
        return pools(self.tasks) if self.share_batches else list(self.tasks)

    @property
    def note(self) -> str | None:
        """What every result made from these data says of them; None where nobody says anything."""
        said = dict.fromkeys(str(own["data"]) for d in self.tasks.values() if "data" in (own := d.describe()))
        return self._note if self._note is not None else "; ".join(said) or None

    def prepare_data(self) -> None:
        """Fetch what the tasks' data need; does nothing the second time."""
        for data in self.tasks.values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the tasks' data; for fit, check that every task can fill a batch.

        Raises:
            ConfigError: A task has fewer samples than one batch, the processes cannot share a batch evenly, or tasks
                that state the same pool have different inputs.
        """
        world_size = self._place()[1]
        if stage == "fit" and self.batch_size % world_size:
            raise ConfigError(
                f"batch size {self.batch_size} per task does not divide among {world_size} processes. "
                f"Set data.init_args.batch_size to a multiple of {world_size}, or trainer.devices to a divisor."
            )
        for data in self.tasks.values():
            data.setup(stage or "fit")
        for key in self.batch_keys:
            if not isinstance(key, str):
                check_pool({task: self.tasks[task] for task in key}, "test" if stage == "test" else self.split)
        if stage == "fit":
            for key, dataset in self._unlabelled().items():
                self._check_size(key, size_of(dataset), self.batch_size, "one batch")

    def train_dataloader(self) -> DataLoader[JointBatch]:
        """Return the endless label-free stream, from the step at which training stands."""
        rank, world_size = self._place()
        datasets = {key: self._first(key, dataset) for key, dataset in self._unlabelled().items()}
        stream = EndlessStream(datasets, self.batch_size, rank, world_size, seed=self.seed)
        return StreamLoader(stream, self._step, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[JointBatch]:
        """Return label-free batches of all tasks over the first ``val_samples`` of each."""
        rank, world_size = self._place()
        datasets = {key: self._drawn(dataset) for key, dataset in self._unlabelled().items()}
        for key, dataset in datasets.items():
            have = min(self.val_samples, size_of(dataset))
            self._check_size(key, have, world_size, "one validation sample for each process")
        batches = SequentialBatches(datasets, self.batch_size, rank, world_size, samples=self.val_samples)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers)

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """Return one labelled loader per entry of ``batch_keys``, in that order."""
        return list(self.labelled_dataloaders("test", self.test_samples).values())

    def labelled_dataloaders(
        self, split: Split, samples: int | None = None, batch_size: int | None = None, supervised: bool = False
    ) -> dict[TaskKey, DataLoader[Sample]]:
        """Return one labelled loader per entry of ``batch_keys``: for comparing merges by labels, never for learning.

        Args:
            split: Which one.
            samples: At most so many per task, evenly spaced over the split, which may be sorted; None takes all.
            batch_size: Samples per batch; ``test_batch_size`` if None.
            supervised: Give samples as training sees them, not as they are scored: the answers among the inputs.
        """
        rank, world_size = self._place()
        datasets = {key: self._labelled(key, split, supervised) for key in self.batch_keys}
        return {
            key: evaluation_loader(
                evenly_spaced(dataset if split == "test" else self._drawn(dataset), samples),
                batch_size or self.test_batch_size,
                self.num_workers,
                rank=rank,
                world_size=world_size,
            )
            for key, dataset in datasets.items()
        }

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data, JSON-able: options, and what each task says of its own."""
        own = {task: data.describe() for task, data in self.tasks.items()}
        options = ["batch_size", "split", "val_samples", "test_samples", "seed", "val_seed", "share_batches"]
        if self.fit_samples is not None:
            options.append("fit_samples")
        return {**{name: getattr(self, name) for name in options}, "tasks": own}

    def _labelled(self, key: TaskKey, split: Split, supervised: bool) -> Dataset[Sample]:
        names = (key,) if isinstance(key, str) else key
        own = {n: self.tasks[n].supervised(split) if supervised else self.tasks[n].dataset(split) for n in names}
        return own[key] if isinstance(key, str) else SharedDataset(own)

    def _unlabelled(self) -> dict[TaskKey, Dataset[Sample]]:
        first = {key: key if isinstance(key, str) else key[0] for key in self.batch_keys}
        return {key: self.tasks[task].unlabelled(self.split) for key, task in first.items()}

    def _first(self, key: TaskKey, dataset: Dataset[Sample]) -> Dataset[Sample]:
        """Return the samples that the first pass over the split would begin with, as many as a fit may see."""
        if self.fit_samples is None or self.fit_samples >= size_of(dataset):
            return dataset
        return Subset(dataset, permutation(self.seed, key, 0, size_of(dataset))[: self.fit_samples].tolist())

    def _drawn(self, dataset: Dataset[Sample]) -> Dataset[Sample]:
        if self.val_seed is None:
            return dataset
        generator = torch.Generator().manual_seed(self.val_seed)
        return Subset(dataset, torch.randperm(size_of(dataset), generator=generator).tolist())

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _step(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0

    def _check_size(self, key: TaskKey, got: int, needed: int, what: str) -> None:
        if got < needed:
            task = key if isinstance(key, str) else ", ".join(key)
            raise ConfigError(
                f"task '{task}' has {got} samples in its '{self.split}' split, {needed} are needed for {what}. "
                "Give it more samples, or lower data.init_args.batch_size."
            )
