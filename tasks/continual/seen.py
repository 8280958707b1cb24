"""What of the tasks' data a protocol reads: the test split of the tasks seen so far, and inputs without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from nscmerge.batching import tasks_of
from nscmerge.errors import ConfigError


def unlabelled(
    data: LightningDataModule, samples: int, batch_size: int | None = None
) -> dict[str, list[dict[str, Tensor]]]:
    """Return batches of inputs of every task's validation split, by task; labels are dropped.

    Args:
        data: All tasks' data.
        samples: At most so many per task, evenly spaced or drawn as the data module says.
        batch_size: Inputs per batch; None takes the data module's.

    Raises:
        ConfigError: The data module gives no batches of a chosen split.
    """
    if not hasattr(data, "labelled_dataloaders"):
        raise ConfigError(f"{type(data).__name__} gives no batches of a chosen split; use datamodules.joint.")
    data.prepare_data()
    data.setup("validate")
    found: dict[str, list[dict[str, Tensor]]] = {}
    for key, loader in data.labelled_dataloaders("val", samples, batch_size).items():
        batches = [{name: value for name, value in batch.items() if name != "target"} for batch in loader]
        found |= dict.fromkeys(tasks_of(key), batches)
    return found


class SeenData(LightningDataModule):
    """The test loaders of the tasks seen so far, of another data module.

    Args:
        data: Has ``task_names``, and ``batch_keys`` in the order of its test loaders.
        tasks: Which ones are seen.

    Raises:
        ConfigError: It is no joint data module.
    """

    def __init__(self, data: LightningDataModule, tasks: Sequence[str]) -> None:
        super().__init__()
        if not hasattr(data, "task_names"):
            raise ConfigError("the protocol needs a data module with task_names, such as datamodules.joint.")
        self.data = data
        self.task_names = list(data.task_names)
        keys = getattr(data, "batch_keys", self.task_names)
        self._wanted = [any(name in tasks for name in tasks_of(key)) for key in keys]
        self.batch_keys = [key for key, wanted in zip(keys, self._wanted, strict=True) if wanted]

    def prepare_data(self) -> None:
        """Fetch what the tasks' data need."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the tasks' data."""
        self.data.trainer = self.trainer
        self.data.setup(stage or "test")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one labelled loader per key that has a task in it that is seen."""
        loaders = self.data.test_dataloader()
        return [loader for loader, wanted in zip(loaders, self._wanted, strict=True) if wanted]
