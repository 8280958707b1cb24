"""Saliency: foreground against background, with classes weighted batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks.dense import IGNORE, DenseTask
from tasks.metrics import SaliencyMaxF, SaliencyMaxFDoubleSigmoid, SaliencyMIoU


class Saliency(DenseTask):
    """Balanced cross entropy on two logits; ``sal_mIoU`` counts, as the paper names it, ``sal_maxF`` stands beside it.

    Args:
        width: As for :class:`DenseTask`.
        depth: Likewise.
    """

    primary, higher_is_better = "sal_mIoU", True

    def __init__(self, width: int = 768, depth: int = 12) -> None:
        super().__init__(2, width, depth)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return :func:`saliency_loss` of (N, 2, H, W) logits and int64 (N, H, W) targets."""
        return saliency_loss(prediction, target)

    def metrics(self) -> MetricCollection:
        """Return the metrics of the foreground's probability; the last for comparison with other programs only."""
        found = {
            "sal_mIoU": SaliencyMIoU(),
            "sal_maxF": SaliencyMaxF(),
            "sal_maxF_double_sigmoid": SaliencyMaxFDoubleSigmoid(),
        }
        return MetricCollection(found, compute_groups=False)


def saliency_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross entropy with weights (1 - w, w) for (background, foreground), over the number of valid pixels.

    w is the share of background among the batch's valid pixels. The sum is divided by the pixel count, not by the sum
    of the weights (sel-update-mtl, losses/loss_functions.py).
    """
    valid = target != IGNORE
    count = valid.sum().clamp_min(1)
    w = (target == 0).sum() / count
    weight = torch.stack([1 - w, w]).to(logits.dtype)
    return nn.functional.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum") / count
