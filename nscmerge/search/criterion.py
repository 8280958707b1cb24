"""What a scale search compares merges by: anything that gives a number per task from some batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from lightning import LightningDataModule
from torch import nn
from torchmetrics import Metric

from nscmerge.adapters import Adapter
from nscmerge.batching import TaskKey

#: Value by task.
TaskValues = dict[str, float]


class Criterion(nn.Module, ABC):
    """Reads one or several curves over the scale from the same forward passes.

    A curve has a suffix; the only one, or the main one, has the empty suffix. What is counted lies in torchmetrics.
    """

    #: Direction of all its curves.
    higher_is_better: bool = False
    #: Whether it does without labels, and so cannot see that a merge is ruined.
    label_free: bool = False
    #: Stage that the data module is set up for.
    stage: str = "validate"

    @property
    def suffixes(self) -> list[str]:
        """Suffixes of the curves, known before anything is measured."""
        return [""]

    @abstractmethod
    def prepare(self, model: nn.Module, experts: Mapping[str, Adapter]) -> None:
        """Do what is done once, before any update is attached to the base model."""

    @abstractmethod
    def batches(self, data: LightningDataModule) -> Iterator[tuple[TaskKey, dict[str, Any]]]:
        """Yield (task, batch), the same in every call; the tuple of their names where tasks share the batch.

        Raises:
            ConfigError: The data module cannot give such batches.
        """

    @abstractmethod
    def update(self, model: nn.Module, tasks: TaskKey, batch: Mapping[str, Any]) -> None:
        """Add a batch for some tasks, by one forward pass where they read the same of the model.

        Args:
            model: Has the candidate switched on.
            tasks: Task, or those of the tasks sharing the batch for which these weights are switched on.
            batch: As :meth:`batches` gave it.
        """

    @abstractmethod
    def compute(self) -> dict[str, TaskValues]:
        """Return ``{suffix: {task: value}}`` of all batches since :meth:`reset`."""

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return what the values depend on beside model, merge and batches; JSON-able."""

    def relative(self, values: TaskValues, experts: TaskValues, suffix: str = "") -> TaskValues:
        """Return the per-task numbers that are averaged, from a candidate's and those of each task's own expert.

        Args:
            values: Of the candidate.
            experts: Of each task's own expert.
            suffix: Of the curve.
        """
        return values

    def total(self, values: TaskValues, experts: TaskValues, suffix: str = "") -> float:
        """Return the one number by which scales are compared: the mean over tasks."""
        return fmean(self.relative(values, experts, suffix).values())
