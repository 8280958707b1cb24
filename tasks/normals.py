"""Surface normals: unit vectors for NYUD and PASCAL, raw maps for Taskonomy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks.dense import IGNORE, DenseTask, mean_over
from tasks.dense_regression import DenseRegression, l1
from tasks.metrics import MeanAngularError


class SurfaceNormals(DenseTask):
    """L1 between unit vectors; the mean angular error in degrees counts.

    Args:
        width: As for :class:`DenseTask`.
        depth: Likewise.
    """

    primary, higher_is_better = "mErr", False

    def __init__(self, width: int = 768, depth: int = 12) -> None:
        super().__init__(3, width, depth)

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return unit vectors, (N, 3, H, W)."""
        return nn.functional.normalize(self.decode(features, inputs), dim=1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the L1 distance, summed over channels, averaged over pixels of which no channel is 255."""
        return mean_over((prediction - target).abs().sum(1), (target != IGNORE).all(1))

    def metrics(self) -> MetricCollection:
        """Return ``mErr`` in degrees."""
        return MetricCollection({"mErr": MeanAngularError()})


class TaskonomyNormals(DenseRegression):
    """Normals as Taskonomy's table scores them: the L1 of raw outputs counts, whatever the loss.

    Args:
        normal_loss: ``l1`` on raw outputs (default: a cosine leaves free the length that the score sees);
            ``cosine_channel``, 1 - cosine over channels; ``sel_width_bug``, 1 - cosine over image rows, as
            sel-update-mtl computes it by mistake.
        width: As for :class:`DenseTask`.
        depth: Likewise.
    """

    def __init__(
        self,
        normal_loss: Literal["l1", "cosine_channel", "sel_width_bug"] = "l1",
        width: int = 768,
        depth: int = 12,
    ) -> None:
        super().__init__(3, width=width, depth=depth)
        self.normal_loss = normal_loss

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the chosen loss of raw outputs, both (N, 3, H, W)."""
        return {"l1": l1, "cosine_channel": cosine_channel, "sel_width_bug": cosine_width}[self.normal_loss](
            prediction, target
        )


def cosine_channel(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between vectors over channels."""
    return (1 - nn.functional.cosine_similarity(prediction, target, dim=1)).mean()


def cosine_width(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between image rows of each channel: the reference's slip, kept for comparison."""
    return (1 - nn.functional.cosine_similarity(prediction, target, dim=-1)).mean()
