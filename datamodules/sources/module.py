"""A task whose data are a published data set: opened once, each split read when it is first asked for."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import Sample, Split, TaskDataModule
from datamodules.sources.resolve import Source, open_source
from datamodules.sources.spec import DatasetSpec
from nscmerge.errors import ConfigError


class SourceDataModule(TaskDataModule):
    """Opens a :class:`DatasetSpec`; a subclass states :meth:`read`.

    Args:
        spec: The data set.
        source: Folder, file or hub id, see :func:`datamodules.sources.open_source`; None takes the hub.
        batch_size: See :class:`TaskDataModule`, as for all that follow.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        source: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.spec, self.source = spec, source
        self._opened: Source | None = None
        self._read: dict[Split, Dataset[Sample]] = {}

    @abstractmethod
    def read(self, opened: Source, split: Split) -> Dataset[Sample]:
        """Return one split as it is scored."""

    def prepare_data(self) -> None:
        """Fetch the data, so that one process alone fills the cache."""
        open_source(self.spec, self.source)

    def setup(self, stage: str | None = None) -> None:
        """Open the data once, whatever the stage."""
        if self._opened is None:
            self._opened = open_source(self.spec, self.source)

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return one split.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        if self._opened is None:
            raise ConfigError(f"{self.spec.name}: the '{split}' split is not open yet; call setup() first.")
        if split not in self._read:
            self._read[split] = self.read(self._opened, split)
        return self._read[split]

    def describe(self) -> dict[str, Any]:
        """Return where the data came from, and what they stand in for if they do."""
        return self._opened.describe() if self._opened else {"source": self.source or str(self.spec.places[0])}
