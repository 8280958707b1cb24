"""Mean angle between predicted and true surface normals."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ShapeError


def angular_errors(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of angles in degrees, fp64, and the number of valid pixels, int64; args as below."""
    pred, target = torch.as_tensor(pred), torch.as_tensor(target)
    if pred.ndim != 4 or pred.shape[1] != 3 or pred.shape != target.shape:
        raise ShapeError(f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}; expected (N, 3, H, W) twice.")
    pixels = (pred.shape[0], *pred.shape[2:])
    mask = torch.ones(pixels, dtype=torch.bool, device=pred.device) if mask is None else torch.as_tensor(mask).bool()
    if tuple(mask.shape) != pixels:
        raise ShapeError(f"mask is {tuple(mask.shape)}, pred {tuple(pred.shape)}; expected a mask (N, H, W).")
    p, g = (_unit(x.movedim(1, -1)[mask].double()) for x in (pred, target))
    # Kahan's form: exact for small angles, where the arc cosine of a dot product loses half of the digits.
    angles = 2 * torch.atan2(torch.linalg.vector_norm(p - g, dim=-1), torch.linalg.vector_norm(p + g, dim=-1))
    return torch.rad2deg(angles).sum(), mask.sum()


def mean_angular_error(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean angle over all valid pixels, in degrees, [0, 180], fp64; NaN if no pixel is valid.

    Pooled: not the mean of per-image errors.

    Args:
        pred: Normals of any length, (N, 3, H, W); a zero vector counts as 90 degrees off.
        target: The same, (N, 3, H, W).
        mask: Valid pixels, bool (N, H, W), or None for all.

    Raises:
        ShapeError: Other shapes.
    """
    total, count = angular_errors(pred, target, mask)
    return total / count


class MeanAngularError(Metric):
    """:func:`mean_angular_error` over many batches and processes.

    Args:
        ignore_value: A pixel is left out if any channel of its target has this value.
    """

    full_state_update, is_differentiable, higher_is_better = False, True, False

    def __init__(self, ignore_value: float = 255) -> None:
        super().__init__()
        self.ignore_value = ignore_value
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: normals of any length, (N, 3, H, W), and the labels, (N, 3, H, W)."""
        total, count = angular_errors(prediction, target, (target != self.ignore_value).all(1))
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the pooled mean in degrees, fp64 scalar."""
        return self.total / self.count


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length == 0, x, x / length)
