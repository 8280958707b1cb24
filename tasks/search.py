"""Labelled criteria of a scale search: the tasks' losses (the papers' protocol) and their scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningDataModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nscmerge.adapters import Adapter
from nscmerge.batching import TaskKey, tasks_of
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.heads import predictions
from nscmerge.search import Criterion, TaskValues
from tasks.base import Task
from tasks.metrics import normalized_score


class _Labelled(Criterion):
    """Predicts with each task's own head on labelled batches of one split.

    Args:
        tasks: Head, prediction, loss and metrics by task name; the weights of the head come from the expert.
        samples: At most so many per task, evenly spaced over the split; None takes all.
        split: Which samples.
        batch_size: Samples per batch; None takes the data module's.
    """

    default_split = "val"
    #: Whether batches are as training sees them, answers to write among the inputs, or as they are scored.
    supervised = False

    def __init__(
        self,
        tasks: dict[str, Task],
        samples: int | None = None,
        split: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("no tasks to measure; state at least one under init_args.tasks of the criterion.")
        if samples is not None and samples < 1:
            raise ConfigError(f"samples is {samples}; expected at least 1, or null for all.")
        self.names, self.tasks = list(tasks), nn.ModuleList(tasks.values())
        self.predictors = nn.ModuleList(tasks.values())
        self.samples, self.split, self.batch_size = samples, split or self.default_split, batch_size
        self.stage = "test" if self.split == "test" else "validate"

    def prepare(self, model: nn.Module, experts: Mapping[str, Adapter]) -> None:
        """Load the heads.

        Raises:
            ConfigError: Tasks and experts have different names, or a task cannot read the model.
            AdapterError: An expert has no head that its task needs, or one of another shape.
        """
        if set(self.names) != set(experts):
            raise ConfigError(
                f"criterion and experts name different tasks: only in the criterion: "
                f"{sorted(set(self.names) - set(experts))}, only experts: {sorted(set(experts) - set(self.names))}. "
                "Make them equal."
            )
        for name, task in self._items():
            if not experts[name].head and task.state_dict():
                raise AdapterError(
                    f"expert '{name}' ({experts[name].source}) has no head.safetensors, which a labelled criterion "
                    "needs. Write experts with 'nscmerge fit' and tasks.finetune.FineTune, or choose by the "
                    "label-free criterion."
                )
            task.load_head(experts[name].head, name)
            task.check(model)

    def batches(self, data: LightningDataModule) -> Iterator[tuple[TaskKey, dict[str, Any]]]:
        """Yield labelled batches, task by task, or pool by pool where tasks share their inputs.

        Raises:
            ConfigError: The data module has none, or not of all tasks.
        """
        if not hasattr(data, "labelled_dataloaders"):
            raise ConfigError(
                f"{type(data).__name__} gives no labelled batches of a chosen split; use datamodules.joint, or choose "
                "by the label-free criterion."
            )
        loaders = data.labelled_dataloaders(self.split, self.samples, self.batch_size, supervised=self.supervised)
        of_key = {key: tasks_of(key) for key in loaders}
        found = sorted(task for tasks in of_key.values() for task in tasks)
        if found != sorted(self.names):
            raise ConfigError(f"the data have the tasks {found}, the criterion {sorted(self.names)}.")
        for key in sorted(loaders, key=lambda key: self.names.index(of_key[key][0])):
            for batch in loaders[key]:
                yield key, batch

    def update(self, model: nn.Module, tasks: TaskKey, batch: Mapping[str, Any]) -> None:
        """Predict a batch and count it."""
        target = batch["target"]
        inputs = {key: value for key, value in batch.items() if key != "target"}
        heads = {name: self.predictors[self.names.index(name)] for name in tasks_of(tasks)}
        for name, prediction in predictions(model, heads, inputs):
            self.count(self.names.index(name), prediction, target[name] if isinstance(target, Mapping) else target)

    @abstractmethod
    def count(self, number: int, prediction: Tensor, target: Tensor) -> None:
        """Add the predictions of a batch of the task of this number."""

    def options(self) -> dict[str, Any]:
        """Return split, sample limit and how the tasks are built."""
        return {
            "split": self.split,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "tasks": {name: task.config() for name, task in self._items()},
        }

    def _items(self) -> Iterator[tuple[str, Task]]:
        for name, task in zip(self.names, self.tasks, strict=True):
            if isinstance(task, Task):
                yield name, task


class Loss(_Labelled):
    """Mean over tasks of a merge's loss over that of the task's own expert; 1 is as good as the experts.

    The papers choose by validation loss (NSC, arXiv:2603.26317, supplement A.3) and do not say how tasks of different
    loss scales are put together; this ratio is our choice.
    """

    supervised = True

    def prepare(self, model: nn.Module, experts: Mapping[str, Adapter]) -> None:
        """Load the heads and start counting."""
        super().prepare(model, experts)
        self.means = nn.ModuleList(MeanMetric(nan_strategy="disable") for _ in self.names)

    def count(self, number: int, prediction: Tensor, target: Tensor) -> None:
        """Add the loss of a batch, once for each of its samples."""
        loss = self.tasks[number].loss(prediction, target).detach()  # type: ignore[operator]
        # Not by weight: torchmetrics forgets weights where it does not look for NaN, and a NaN must show.
        self.means[number].update(loss.expand(len(target)))  # type: ignore[operator]

    def compute(self) -> dict[str, TaskValues]:
        """Return the mean loss per sample of every task, in the task's own unit."""
        return {"": {name: float(mean.compute()) for name, mean in zip(self.names, self.means, strict=True)}}

    def relative(self, values: TaskValues, experts: TaskValues, suffix: str = "") -> TaskValues:
        """Return every loss over the expert's.

        Raises:
            ConfigError: An expert's loss is not a positive number, so that nothing can be measured against it.
        """
        for task, loss in experts.items():
            if not 0 < loss < float("inf"):
                raise ConfigError(
                    f"expert '{task}' has the loss {loss} on the {self.split} samples, which nothing can be divided "
                    "by. Take more samples, or look at that expert with 'nscmerge test'."
                )
        return {task: loss / experts[task] for task, loss in values.items()}


class Score(_Labelled):
    """Mean normalized score in percent, as :class:`tasks.benchmark.Benchmark` computes it; higher is better.

    As a criterion on ``val``, or to judge the choices of others on ``test``.
    """

    higher_is_better = True
    default_split = "test"

    def prepare(self, model: nn.Module, experts: Mapping[str, Adapter]) -> None:
        """Load the heads and what decodes answers, and start counting."""
        super().prepare(model, experts)
        self.predictors = nn.ModuleList(task.evaluator() for _, task in self._items())
        self.metrics = nn.ModuleList(task.metrics() for _, task in self._items()).requires_grad_(False)

    def count(self, number: int, prediction: Tensor, target: Tensor) -> None:
        """Add a batch to the task's metrics."""
        self.metrics[number].update(prediction, target)  # type: ignore[operator]

    def compute(self) -> dict[str, TaskValues]:
        """Return the primary metric of every task, in its own unit."""
        pairs = zip(self._items(), self.metrics, strict=True)
        return {"": {name: float(m.compute()[task.primary]) for (name, task), m in pairs}}  # type: ignore[operator]

    def relative(self, values: TaskValues, experts: TaskValues, suffix: str = "") -> TaskValues:
        """Return every score in percent of the expert's, turned round where lower is better."""
        return {
            name: normalized_score(values[name], experts[name], task.higher_is_better) for name, task in self._items()
        }
