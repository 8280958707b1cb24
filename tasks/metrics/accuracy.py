"""Share of right classes."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.errors import ConfigError, ShapeError


def accuracy(pred: Tensor, target: Tensor, mask_class: int | None = None) -> Tensor:
    """Return the share of samples whose class is right, in [0, 1]; NaN without samples.

    The class for many batches is ``torchmetrics.classification.MulticlassAccuracy(average="micro")``.

    Args:
        pred: Class indices, (N,), or scores, (N, C), of which the largest counts.
        target: Class indices, (N,).
        mask_class: A class that a task with fewer labels never predicts: its scores count as minus infinity.

    Raises:
        ShapeError: The number of samples differs.
        ConfigError: A class is masked of indices, or there is none of that number.
    """
    pred, target = torch.as_tensor(pred), torch.as_tensor(target)
    if mask_class is not None:
        if pred.ndim != 2 or not 0 <= mask_class < pred.shape[1]:
            raise ConfigError(
                f"mask_class={mask_class} of pred {tuple(pred.shape)}; expected scores (N, C), class < C."
            )
        pred = pred.index_fill(1, torch.tensor([mask_class], device=pred.device), -torch.inf)
    if pred.ndim == target.ndim + 1:
        pred = pred.argmax(-1)
    if pred.shape != target.shape:
        raise ShapeError(
            f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}; expected (N,) or (N, C) and (N,)."
        )
    return (pred == target).double().mean()
