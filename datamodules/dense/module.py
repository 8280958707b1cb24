"""What the three dense data sets share as data modules: reading once, checking first, and saying what was read."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from datamodules.base import LabelledDataset, Sample, Split, TaskDataModule
from datamodules.dense.datasets import NamedDataset
from datamodules.dense.files import Size
from datamodules.dense.lists import list_hash
from datamodules.dense.transforms import MEAN_STD, Normalization
from nscmerge.errors import ConfigError, DatasetNotFoundError

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class DenseDataModule(TaskDataModule):
    """One dense task of a data set on disk; a subclass states :meth:`read_splits` and :meth:`facts`.

    The ``expected_*`` attributes say what the published data set looks like; a subclass for other data of the same
    layout sets them to None, which takes anything.

    Args:
        task: One of the class's ``tasks``.
        root: Folder of the data set.
        size: (H, W) that a model sees.
        normalization: ``imagenet`` or ``half``, see ``datamodules.dense.transforms``.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random views of the training samples; not negative.
        verify: Read every image and label during setup, so that a broken file is named before training starts;
            otherwise only that all files are there, and the first sample of each split.

    Raises:
        ConfigError: The data set has no such task, or an option is out of range.
    """

    #: What receipts and tables call the data.
    data_name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    #: SHA-256 prefixes by name of the list, see ``datamodules.dense.lists.list_hash``.
    expected_hashes: ClassVar[Mapping[str, str] | None] = None
    #: Sizes by name of the list or split.
    expected_counts: ClassVar[Mapping[str, int] | None] = None
    #: (H, W) of every image.
    expected_image_size: ClassVar[Size | None] = None

    def __init__(
        self,
        task: str,
        root: Path,
        size: Size,
        normalization: Normalization,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        verify: bool,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if task not in self.tasks:
            close = difflib.get_close_matches(str(task), self.tasks, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise ConfigError(f"{self.data_name} has no task '{task}'{hint} Known: {', '.join(self.tasks)}.")
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"data.init_args.size is {size}; expected height and width, at least 1 each.")
        if normalization not in MEAN_STD:
            raise ConfigError(f"no normalization '{normalization}'; known: {', '.join(MEAN_STD)}.")
        if seed < 0:
            raise ConfigError(f"data.init_args.seed is {seed}; it must not be negative.")
        self.task, self.root = task, Path(root)
        self.size: Size = (size[0], size[1])
        self.normalization, self.verify = normalization, verify
        self._datasets: dict[Split, NamedDataset] = {}

    @abstractmethod
    def read_splits(self) -> dict[Split, NamedDataset]:
        """Return all three splits, their lists and files checked; decodes no image."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what :meth:`describe` says of lists, dropped samples and transforms; called after :meth:`setup`."""

    @abstractmethod
    def pool_key(self) -> Hashable:
        """Return what tasks of one pool have in common besides class, root, size and normalisation."""

    @property
    def pool(self) -> Hashable:  # type: ignore[override]
        """Return what says which inputs this task sees: tasks with equal pools have the same ones."""
        return type(self).__qualname__, str(self.root), self.size, self.normalization, self.pool_key()

    def setup(self, stage: str | None = None) -> None:
        """Read the lists and check them, the files and the first samples, once, whatever the stage.

        Raises:
            DatasetNotFoundError: The folder, a list or a file is missing, or a list is not the published one.
            DataError: A list or a file cannot be used.
        """
        if self._datasets:
            return
        if not self.root.is_dir():
            raise DatasetNotFoundError(
                f"{self.data_name}: there is no folder {self.root}. Set data.init_args.root to the data set's folder."
            )
        datasets = self.read_splits()
        for dataset in datasets.values():
            _ = dataset.inputs(0), dataset.target(0)  # what is wrong with all files shows in the first
        if self.verify:
            for split, dataset in datasets.items():
                rank_zero_info(f"{self.data_name}: reading all {len(dataset)} samples of '{split}' once.")
                read_all(dataset)
        self._datasets = datasets

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return one split.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        return self._split(split)

    def _split(self, split: Split) -> NamedDataset:
        if split not in self._datasets:
            raise ConfigError(f"{type(self).__name__}: the '{split}' split is not read yet; call setup() first.")
        return self._datasets[split]

    def describe(self) -> dict[str, Any]:
        """Return what a result should keep of its data, JSON-able: where, which lists, how many, what was done to them.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        splits = {split: self._split(split) for split in SPLITS}
        return {
            "data": self.data_name,
            "task": self.task,
            "root": str(self.root),
            "counts": {split: len(dataset) for split, dataset in splits.items()},
            "lists": {split: list_hash(dataset.ids) for split, dataset in splits.items()},
            "size": list(self.size),
            "normalization": self.normalization,
            "seed": self.seed,
            **self.facts(),
        }

    def expected_count(self, name: str) -> int | None:
        """Return how long a published list is; None where any length will do."""
        return None if self.expected_counts is None else self.expected_counts.get(name)

    def expected_hash(self, name: str) -> str | None:
        """Return how the hash of a published list starts; None where any will do."""
        return None if self.expected_hashes is None else self.expected_hashes.get(name)


def read_all(dataset: LabelledDataset) -> None:
    """Read every input and label once, in threads; the first broken file is raised as its own error."""

    def read(index: int) -> None:
        dataset.inputs(index)
        dataset.target(index)

    with ThreadPoolExecutor() as threads:
        try:
            for _ in threads.map(read, range(len(dataset))):
                pass
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
