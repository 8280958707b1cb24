"""Mean absolute difference, pooled over pixels and channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ShapeError
from tasks.metrics.differences import valid_differences


def l1(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean absolute difference over all valid elements, in the target's unit; NaN if none is valid.

    Pooled: not the mean of per-image errors. Args and errors as :func:`valid_differences`.
    """
    return valid_differences(pred, target, mask).abs().mean()


class L1(Metric):
    """:func:`l1` over many batches and processes.

    The target may hold one channel more than the prediction: the last one, which says where it is valid (1 or 0).

    Args:
        mask_channel: Count valid pixels alone (the ``*_masked`` reports). If False all pixels count, as in the papers'
            code, and a validity channel is not read.
    """

    full_state_update, is_differentiable, higher_is_better = False, True, False

    def __init__(self, mask_channel: bool = False) -> None:
        super().__init__()
        self.mask_channel = mask_channel
        # Names of their own: a MetricCollection takes metrics for one if their states agree after the first batch, as
        # they do where that batch has no hole.
        self._names = ("valid_total", "valid_count") if mask_channel else ("total", "count")
        self.add_state(self._names[0], torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._names[1], torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: (N, C, H, W), or (N, H, W) for one channel.
            target: (N, C, H, W), (N, C + 1, H, W) with validity, or (N, H, W) for one channel without it.

        Raises:
            ShapeError: Shapes differ otherwise, or validity is asked for and not there.
        """
        values, labels = _channels(prediction), _channels(target)
        channels, mask = values.shape[1], None
        if self.mask_channel:
            if labels.shape[1] != channels + 1:
                raise ShapeError(
                    f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}; the masked difference "
                    "needs a target with one channel more, which holds 1 where it is valid."
                )
            mask = (labels[:, channels:] != 0).expand_as(values)
        if labels.shape[1] == channels + 1:
            labels = labels[:, :channels]
        errors = valid_differences(values, labels, mask).abs()
        for name, value in zip(self._names, (errors.sum(), errors.numel()), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """Return the pooled difference, fp64 scalar."""
        total, count = (getattr(self, name) for name in self._names)
        return total / count


def _channels(x: Tensor) -> Tensor:
    """Return ``x`` as (N, C, H, W)."""
    return x[:, None] if x.ndim == 3 else x
