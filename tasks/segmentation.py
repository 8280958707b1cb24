"""Semantic segmentation and human parts."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks.dense import IGNORE, DenseTask
from tasks.metrics import MeanIoU


class Segmentation(DenseTask):
    """Cross entropy over labelled pixels; the pooled mIoU in percent counts.

    Args:
        num_classes: Number of classes, background included.
        skip_absent: Leave classes that occur nowhere out of the mean instead of counting them as 0; for small sets.
        width: As for :class:`DenseTask`.
        depth: Likewise.
    """

    primary, higher_is_better = "mIoU", True

    def __init__(self, num_classes: int, skip_absent: bool = False, width: int = 768, depth: int = 12) -> None:
        super().__init__(num_classes, width, depth)
        self.num_classes, self.skip_absent = num_classes, skip_absent

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy over pixels that are not 255, in nats; (N, C, H, W) and int64 (N, H, W)."""
        return segmentation_loss(prediction, target)

    def metrics(self) -> MetricCollection:
        """Return ``mIoU`` of the most likely class."""
        return MetricCollection({"mIoU": MeanIoU(self.num_classes, IGNORE, self.skip_absent)})


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy over pixels that are not 255; 0 where none is labelled, not NaN."""
    total = nn.functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)
