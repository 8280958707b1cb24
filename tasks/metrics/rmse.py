"""Root mean squared error, pooled over everything valid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ShapeError


def squared_errors(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of squared errors, fp64, and the number of valid elements, int64.

    Args:
        pred: Any shape.
        target: The same shape.
        mask: Valid elements, bool, the same shape, or None for all.

    Raises:
        ShapeError: The shapes differ; nothing is broadcast.
    """
    pred, target = torch.as_tensor(pred), torch.as_tensor(target)
    mask = torch.ones(pred.shape, dtype=torch.bool, device=pred.device) if mask is None else torch.as_tensor(mask)
    if not pred.shape == target.shape == mask.shape:
        raise ShapeError(
            f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}, mask {tuple(mask.shape)}; all must agree."
        )
    mask = mask.bool()
    # Select first: what lies under the mask may be NaN.
    return (pred[mask].double() - target[mask].double()).square().sum(), mask.sum()


def rmse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the root of the mean squared error over all valid elements, in the target's unit; NaN if none is valid.

    Pooled: not the mean of per-image errors. Args and errors as :func:`squared_errors`.
    """
    total, count = squared_errors(pred, target, mask)
    return (total / count).sqrt()


class RMSE(Metric):
    """:func:`rmse` over many batches and processes; unlike torchmetrics' MeanSquaredError it takes a mask."""

    full_state_update, is_differentiable, higher_is_better = False, True, False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        total, count = squared_errors(pred, target, mask)
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the pooled error, fp64 scalar."""
        return (self.total / self.count).sqrt()
