"""All tasks of a suite as one data module: label-free for fit and validate, labelled task by task for test."""

from __future__ import annotations

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.base import Sample, Split, TaskDataModule, evaluation_loader, evenly_spaced
from datamodules.stream import EndlessStream, JointBatch, SequentialBatches, StreamLoader
from nscmerge.errors import ConfigError


class JointDataModule(LightningDataModule):
    """Joins tasks: fit and validate yield ``{task: inputs}`` without labels, test has one labelled loader per task.

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
        }.items():
            if value < 1:
                raise ConfigError(f"data.init_args.{option} is {value}; it must be at least 1.")
        self.tasks, self.batch_size, self.split = dict(tasks), batch_size, split
        self.val_samples, self.test_batch_size, self.test_samples = val_samples, test_batch_size, test_samples
        self.num_workers, self.seed, self.val_seed = num_workers, seed, val_seed

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of the test loaders."""
        return list(self.tasks)

    def prepare_data(self) -> None:
        """Fetch what the tasks' data need; does nothing the second time."""
        for data in self.tasks.values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the tasks' data; for fit, check that every task can fill a batch.

        Raises:
            ConfigError: A task has fewer samples than one batch, or the processes cannot share a batch evenly.
        """
        world_size = self._place()[1]
        if stage == "fit" and self.batch_size % world_size:
            raise ConfigError(
                f"batch size {self.batch_size} per task does not divide among {world_size} processes. "
                f"Set data.init_args.batch_size to a multiple of {world_size}, or trainer.devices to a divisor."
            )
        for data in self.tasks.values():
            data.setup(stage or "fit")
        if stage == "fit":
            for task, dataset in self._unlabelled().items():
                self._check_size(task, len(dataset), self.batch_size, "one batch")  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[JointBatch]:
        """Return the endless label-free stream, from the step at which training stands."""
        rank, world_size = self._place()
        stream = EndlessStream(self._unlabelled(), self.batch_size, rank, world_size, seed=self.seed)
        return StreamLoader(stream, self._step, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[JointBatch]:
        """Return label-free batches of all tasks over the first ``val_samples`` of each."""
        rank, world_size = self._place()
        datasets = {task: self._drawn(dataset) for task, dataset in self._unlabelled().items()}
        for task, dataset in datasets.items():
            have = min(self.val_samples, len(dataset))  # type: ignore[arg-type]
            self._check_size(task, have, world_size, "one validation sample for each process")
        batches = SequentialBatches(datasets, self.batch_size, rank, world_size, samples=self.val_samples)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers)

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """Return one labelled loader per task, in the order of ``task_names``."""
        return list(self.labelled_dataloaders("test", self.test_samples).values())

    def labelled_dataloaders(
        self, split: Split, samples: int | None = None, batch_size: int | None = None
    ) -> dict[str, DataLoader[Sample]]:
        """Return one labelled loader per task, for what compares merges with labels; learning never asks for it.

        Args:
            split: Which one.
            samples: At most so many per task, evenly spaced over the split, which may be sorted; None takes all.
            batch_size: Samples per batch; ``test_batch_size`` if None.
        """
        rank, world_size = self._place()
        return {
            task: evaluation_loader(
                evenly_spaced(data.dataset(split) if split == "test" else self._drawn(data.dataset(split)), samples),
                batch_size or self.test_batch_size,
                self.num_workers,
                rank=rank,
                world_size=world_size,
            )
            for task, data in self.tasks.items()
        }

    def _unlabelled(self) -> dict[str, Dataset[Sample]]:
        return {task: data.unlabelled(self.split) for task, data in self.tasks.items()}

    def _drawn(self, dataset: Dataset[Sample]) -> Dataset[Sample]:
        if self.val_seed is None:
            return dataset
        generator = torch.Generator().manual_seed(self.val_seed)
        return Subset(dataset, torch.randperm(len(dataset), generator=generator).tolist())  # type: ignore[arg-type]

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _step(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0

    def _check_size(self, task: str, got: int, needed: int, what: str) -> None:
        if got < needed:
            raise ConfigError(
                f"task '{task}' has {got} samples in its '{self.split}' split, {needed} are needed for {what}. "
                "Give it more samples, or lower data.init_args.batch_size."
            )
