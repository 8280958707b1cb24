"""Mean squared error and its root, pooled over everything valid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.metrics.differences import valid_differences


def mse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error over all valid elements, in the target's unit squared; NaN if none is valid.

    Pooled: not the mean of per-image errors. Args and errors as :func:`valid_differences`.
    """
    return valid_differences(pred, target, mask).square().mean()


def rmse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the root of :func:`mse`, in the target's unit; NaN if no element is valid.

    For principal curvature pred and target are (N, 2, H, W) and both channels are pooled, too.
    """
    return mse(pred, target, mask).sqrt()


class MSE(Metric):
    """:func:`mse` over many batches and processes; unlike torchmetrics' MeanSquaredError it takes a mask.

    Args:
        ignore_value: Target value that marks an invalid element, such as 255 in depth maps; None if there is none.
    """

    full_state_update, is_differentiable, higher_is_better = False, True, False

    def __init__(self, ignore_value: float | None = None) -> None:
        super().__init__()
        self.ignore_value = ignore_value
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; an element counts if the mask has it and its target is not the value to ignore."""
        if self.ignore_value is not None:
            labelled = target != self.ignore_value
            mask = labelled if mask is None else mask.bool() & labelled
        errors = valid_differences(pred, target, mask).square()
        self.total += errors.sum()
        self.count += errors.numel()

    def compute(self) -> Tensor:
        """Return the pooled error, fp64 scalar."""
        return self.total / self.count


class RMSE(MSE):
    """:func:`rmse` over many batches and processes. Args as :class:`MSE`."""

    def compute(self) -> Tensor:
        """Return the pooled error, fp64 scalar."""
        return super().compute().sqrt()
