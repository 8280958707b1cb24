"""Text classification."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tasks.text import TextTask


class TextClassification(TextTask):
    """Cross entropy on class logits; accuracy over all samples, in [0, 1].

    Args:
        num_classes: Number of classes.
        hidden_size: Width of the encoder's last hidden state.
    """

    primary, higher_is_better = "accuracy", True
    outputs = "classes"

    def __init__(self, num_classes: int, hidden_size: int = 384) -> None:
        super().__init__(num_classes, hidden_size)
        self.num_classes = num_classes

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return class logits, (N, num_classes)."""
        return self.scores(features)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy, in nats."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> MetricCollection:
        """Return ``accuracy``: every sample counts the same, whatever its class."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})
