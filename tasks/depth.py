"""Depth in metres."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.wrappers import LambdaInputTransformer

from tasks.dense import IGNORE, DenseTask, mean_over
from tasks.metrics import RMSE


class Depth(DenseTask):
    """Absolute error in metres; the RMSE of the prediction clamped at 0 counts.

    Args:
        width: As for :class:`DenseTask`.
        depth: Likewise.
    """

    primary, higher_is_better = "rmse", False

    def __init__(self, width: int = 768, depth: int = 12) -> None:
        super().__init__(1, width, depth)

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return metres, (N, H, W), not clamped."""
        return self.decode(features, inputs)[:, 0]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean absolute error over pixels that are not 255, in metres; both (N, H, W)."""
        return mean_over((prediction - target).abs(), target != IGNORE)

    def metrics(self) -> MetricCollection:
        """Return ``rmse`` in metres."""
        return MetricCollection({"rmse": LambdaInputTransformer(RMSE(ignore_value=IGNORE), not_negative)})


def not_negative(depth: Tensor) -> Tensor:
    """Return depth clamped at 0."""
    return depth.clamp_min(0)
