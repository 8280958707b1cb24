"""Labelled training batches of several sources side by side, for pre-training; no validation, no test."""

from __future__ import annotations

from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from datamodules.base import TaskDataModule
from nscmerge.errors import ConfigError


class MixedDataModule(LightningDataModule):
    """Yields ``{source: batch}`` from the training split of every source; shorter ones start over within an epoch.

    Args:
        sources: Data modules by name; each batch keeps its own size.

    Raises:
        ConfigError: There is no source.
    """

    def __init__(self, sources: dict[str, TaskDataModule]) -> None:
        super().__init__()
        if not sources:
            raise ConfigError("no sources given to MixedDataModule; state at least one under data.init_args.sources.")
        self.sources = dict(sources)

    def prepare_data(self) -> None:
        """Fetch or render what the sources need."""
        for data in self.sources.values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the sources."""
        for data in self.sources.values():
            data.setup(stage or "fit")

    def train_dataloader(self) -> CombinedLoader:
        """Return the sources' training batches, side by side."""
        return CombinedLoader({name: data.train_dataloader() for name, data in self.sources.items()}, "max_size_cycle")
