"""Share of right classes."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.errors import ShapeError


def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """Return the share of samples whose class is right, in [0, 1]; NaN without samples.

    The class for many batches is ``torchmetrics.classification.MulticlassAccuracy(average="micro")``.

    Args:
        pred: Class indices, (N,), or scores, (N, C), of which the largest counts.
        target: Class indices, (N,).

    Raises:
        ShapeError: The number of samples differs.
    """
    pred, target = torch.as_tensor(pred), torch.as_tensor(target)
    if pred.ndim == target.ndim + 1:
        pred = pred.argmax(-1)
    if pred.shape != target.shape:
        raise ShapeError(
            f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}; expected (N,) or (N, C) and (N,)."
        )
    return (pred == target).double().mean()
