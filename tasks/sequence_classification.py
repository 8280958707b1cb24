"""Classification of texts by a decoder: a linear head on the hidden state of each text's last token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from nscmerge.errors import ConfigError
from tasks.base import Task


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the state of every row's right-most valid token, (N, T, d) and (N, T) -> (N, d).

    The same token whichever side the padding is on. By the mask and not by the pad id, so that a text that ends in a
    token which also serves as padding is read at its end. A row without any valid token is read at its first.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = ((mask != 0) * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]


class MaskedAccuracy(Metric):
    """Share of samples whose largest logit is the right class, in [0, 1], each counting the same.

    Args:
        num_classes: Width of the predictions.
        mask_class: A class that is never predicted, whatever its logit; None for none.
    """

    full_state_update, higher_is_better = False, True

    def __init__(self, num_classes: int, mask_class: int | None = None) -> None:
        super().__init__()
        self.num_classes, self.mask_class = num_classes, mask_class
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits, (N, num_classes), and class indices, (N,)."""
        if self.mask_class is not None:
            prediction = _without(prediction, self.mask_class, -torch.inf)
        self.correct += (prediction.argmax(-1) == target).sum()
        self.total += target.numel()

    def compute(self) -> Tensor:
        """Return the share, fp64 scalar; NaN without samples."""
        return self.correct.double() / self.total


def _without(logits: Tensor, mask_class: int, value: float) -> Tensor:
    return logits.index_fill(-1, torch.tensor([mask_class], device=logits.device), value)


class SequenceClassification(Task):
    """Cross entropy on the logits of a head without bias; accuracy in [0, 1].

    A task with fewer labels than the head has logits names the one that it does not use: its logit is set to the
    dtype's minimum in the loss and to minus infinity in the metric. The prediction itself is the raw logits, of which
    AdaMerging as published takes the entropy.

    Source: the NLI tasks of NSC (arXiv:2603.26317) and KnOTS, which share three logits: entailment, neutral,
    contradiction.

    Args:
        num_classes: Number of logits.
        hidden_size: Width of the decoder's last hidden state.
        mask_class: The class that the task does not have; None where it has all.

    Raises:
        ConfigError: ``mask_class`` is no class.
    """

    primary, higher_is_better = "accuracy", True
    outputs = "classes"

    def __init__(self, num_classes: int = 3, hidden_size: int = 4096, mask_class: int | None = None) -> None:
        super().__init__()
        if mask_class is not None and not 0 <= mask_class < num_classes:
            raise ConfigError(f"mask_class is {mask_class}; expected one of the {num_classes} classes, or null.")
        self.num_classes, self.hidden_size, self.mask_class = num_classes, hidden_size, mask_class
        self.linear = nn.Linear(hidden_size, num_classes, bias=False)

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model is not as wide as the head."""
        config = getattr(model, "config", None)
        width = getattr(config, "hidden_size", self.hidden_size)
        if width != self.hidden_size:
            raise ConfigError(
                f"the head reads {self.hidden_size} features, {type(model).__name__} has {width}; "
                f"set the task's hidden_size to {width}."
            )

    def load_head(self, head: Mapping[str, Tensor], owner: str) -> None:
        """As :meth:`tasks.base.Task.load_head`; PEFT's own name for the head, ``score.weight``, will do."""
        if len(head) == 1 and next(iter(head)).endswith(("score.weight", "classifier.weight")):
            head = {"linear.weight": next(iter(head.values()))}
        super().load_head(head, owner)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the last hidden state of every text's last token, (N, hidden_size).

        Raises:
            ConfigError: The model gives no hidden states, as those with a language head do not.
        """
        output = model(**inputs)
        if not hasattr(output, "last_hidden_state"):
            raise ConfigError(
                f"{type(model).__name__} gives no last_hidden_state to classify; "
                "load the base model as the plain decoder, model_class AutoModel."
            )
        return last_token(output.last_hidden_state, inputs["attention_mask"])

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the raw logits, (N, num_classes), of all classes."""
        logits: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return logits

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy, in nats, in fp32."""
        logits = prediction.float()
        if self.mask_class is not None:
            logits = _without(logits, self.mask_class, torch.finfo(logits.dtype).min)
        return nn.functional.cross_entropy(logits, target)

    def metrics(self) -> MetricCollection:
        """Return ``accuracy``, with the class mask."""
        return MetricCollection({"accuracy": MaskedAccuracy(self.num_classes, self.mask_class)})
