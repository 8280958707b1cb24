"""What mean absolute and mean squared errors are pooled from."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.errors import ShapeError


def valid_differences(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``pred - target`` of all valid elements, fp64 (n,).

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
    return pred[mask].double() - target[mask].double()
