"""What a task is: a head on the base model, its loss, and the metric that counts. No trainer in here."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection

from nscmerge.errors import AdapterError


class Task(nn.Module, ABC):
    """Head, prediction, loss and metrics of one task; its ``state_dict`` is the head that an expert folder keeps.

    A subclass keeps every argument of its constructor as the attribute of the same name, so that a task can be written
    down and built again.
    """

    #: Key in :meth:`metrics` of the score that is normalized and compared.
    primary: str
    #: Direction of that score; stated, as torchmetrics leaves it open for correlations.
    higher_is_better: bool
    #: What the prediction is: ``classes``, one logit per class and sample, (N, C); ``tokens``, logits of the next token
    #: at every position, (N, T, V), or at the last, (N, V); or ``values``, which are no logits at all.
    outputs: Literal["classes", "tokens", "values"]
    #: How many training samples :meth:`fit_head` wants to see, evenly spaced; None for all, 0 for none.
    head_samples: int | None = None

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the head cannot read this base model; nothing by default."""

    @abstractmethod
    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what the head reads of the backbone; depends on the model and :meth:`reads`, on no head."""

    @abstractmethod
    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction from the features, in the form that loss and metrics take."""

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction for a batch."""
        return self.predict(self.features(model, inputs), inputs)

    def reads(self) -> Hashable:
        """Return what tells :meth:`features` apart: tasks with equal values have equal features on equal inputs.

        By default those of one class; a subclass whose features depend on an argument adds it.
        """
        return type(self).features

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the training loss of a batch, a scalar."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return new metrics, all of the form ``update(prediction, target)``."""

    def validation_metrics(self) -> MetricCollection:
        """Return new metrics for the curves of a training; :meth:`metrics` unless those take too long."""
        return self.metrics()

    def evaluator(self) -> nn.Module:
        """Return what gives the predictions that :meth:`metrics` take: the task itself, unless answers are decoded.

        Called as ``evaluator(model, inputs)``.
        """
        return self

    def notes(self) -> list[str]:
        """Return what a record of scores must say of how they were measured; nothing by default."""
        return []

    def fit_head(self, targets: Tensor) -> None:
        """Adapt fixed parts of the head to the training targets, (N, ...), before training; nothing by default."""

    def config(self) -> dict[str, Any]:
        """Return ``class_path`` and ``init_args``, JSON-able, from which the task can be built again."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": {name: getattr(self, name) for name in names},
        }

    def load_head(self, head: Mapping[str, Tensor], owner: str) -> None:
        """Take over an expert's head; its dtype may differ.

        Args:
            head: Tensors by name, as ``state_dict`` has them.
            owner: Whose head it is, for the message.

        Raises:
            AdapterError: There is no head and the task needs one, or names or shapes are not this task's.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in head.items()}
        if expected and not got:
            raise AdapterError(
                f"expert '{owner}' has no head.safetensors, which {type(self).__name__} needs. "
                "Write experts with 'nscmerge fit' and tasks.finetune.FineTune."
            )
        if len(got) == 1 and list(got.values()) == list(expected.values()):
            # PEFT's name of a head of one matrix ('score.weight') is that of the class that it was trained in.
            head = dict(zip(expected, head.values(), strict=True))
        elif got != expected:
            raise AdapterError(
                f"the head of '{owner}' has {got}; {type(self).__name__} expects {expected}. "
                "Name the task that the expert was trained with, with the same arguments."
            )
        self.load_state_dict(dict(head))
