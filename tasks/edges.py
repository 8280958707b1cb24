"""Edges between regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from tasks.dense import IGNORE, DenseTask, mean_over
from tasks.edge_matching.protocol import Protocol
from tasks.metrics import EdgeAveragePrecision, EdgeReferenceLoss, OdsF, OisF
from tasks.metrics.ods_f import edge_counter

if TYPE_CHECKING:
    from tasks.edge_matching.workers import EdgeCounter


class Edges(DenseTask):
    """Balanced binary cross entropy; the real ods-F counts, the loss that others report as a score stands beside it.

    The target has two channels: the map to learn, and the boundaries that ods-F matches with (spec section 4.1).

    Args:
        max_dist: Matching distance over the image diagonal: 0.0075 for PASCAL, 0.011 for NYUD.
        thresholds: How many ods-F tries; 101 for reported numbers, 19 while developing.
        workers: Processes that match edges; 0 takes this one.
        weight: Weight w of edge pixels in the loss, 1 - w of others.
        width: As for :class:`DenseTask`.
        depth: Likewise.
        cache: Folder that keeps the counts of matched images, so that a test that was cut off goes on; None keeps none.
    """

    primary, higher_is_better = "odsF", True

    def __init__(
        self,
        max_dist: float = 0.0075,
        thresholds: int = 101,
        workers: int = 0,
        weight: float = 0.95,
        width: int = 768,
        depth: int = 12,
        cache: str | None = None,
    ) -> None:
        super().__init__(1, width, depth)
        self.max_dist, self.thresholds, self.workers, self.weight = max_dist, thresholds, workers, weight
        self.cache = cache
        self._counter: EdgeCounter | None = None

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits, (N, H, W)."""
        return self.decode(features, inputs)[:, 0]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return :func:`edge_loss` of (N, H, W) logits and the first channel of a (N, 2, H, W) target."""
        return edge_loss(prediction, target[:, 0], self.weight)

    def metrics(self) -> MetricCollection:
        """Return ``odsF``, ``oisF``, ``AP`` in [0, 1], and ``edge_refloss``, lower for blank maps than for useful ones.

        The first three come of one count of the matched pixels. All metrics of this task share its workers: a benchmark
        has one set of metrics for every merge that it tests.

        Raises:
            ConfigError: SciPy is missing.
        """
        protocol = Protocol.of(self.max_dist, self.thresholds)
        if self._counter is None:
            self._counter = edge_counter(protocol, self.workers, self.cache)
        kinds = {"odsF": OdsF, "oisF": OisF, "AP": EdgeAveragePrecision}
        found: dict[str, Metric] = {
            name: kind(self.max_dist, self.thresholds, counter=self._counter) for name, kind in kinds.items()
        }
        found["edge_refloss"] = EdgeReferenceLoss(self.weight)
        return MetricCollection(found, compute_groups=[list(kinds), ["edge_refloss"]])

    def validation_metrics(self) -> MetricCollection:
        """Return ``edge_refloss`` alone: matching edges takes seconds per image."""
        return MetricCollection({"edge_refloss": EdgeReferenceLoss(self.weight)})


def edge_loss(logits: Tensor, target: Tensor, weight: float = 0.95) -> Tensor:
    """Return the mean of w y softplus(-x) + (1 - w) (1 - y) softplus(x) over pixels with y != 255.

    Args:
        logits: x, (N, H, W).
        target: y, 0, 1 or 255, float (N, H, W).
        weight: w.
    """
    softplus = nn.functional.softplus
    cost = weight * target * softplus(-logits) + (1 - weight) * (1 - target) * softplus(logits)
    return mean_over(cost, target != IGNORE)
