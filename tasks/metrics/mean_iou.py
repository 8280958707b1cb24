"""Mean intersection over union, pooled over the data set before dividing."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ConfigError, ShapeError


def confusion(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels into (C, C), int64: row target, column prediction.

    Args:
        pred: Classes, any integer dtype and shape.
        target: Classes, the same shape; pixels of ``ignore_index`` are left out, whatever the prediction there.
        num_classes: C.
        ignore_index: Label of unlabelled pixels.

    Raises:
        ShapeError: The shapes differ.
        ConfigError: A class at a labelled pixel is not one of 0 to C - 1.
    """
    pred, target = torch.as_tensor(pred), torch.as_tensor(target)
    if pred.shape != target.shape:
        raise ShapeError(f"pred is {tuple(pred.shape)}, target {tuple(target.shape)}; both must be one class a pixel.")
    keep = target != ignore_index
    pred, target = pred[keep].long(), target[keep].long()
    for name, classes in (("prediction", pred), ("target", target)):
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if len(wrong):
            raise ConfigError(
                f"{name} has class {int(wrong[0])}; expected 0 to {num_classes - 1}, or {ignore_index} in the target "
                "for unlabelled pixels. Check num_classes and the label files."
            )
    return torch.bincount(target * num_classes + pred, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou_of_counts(counts: Tensor, skip_absent: bool = False) -> Tensor:
    """Return the mean over classes of TP / (TP + FP + FN), in percent, fp64.

    Args:
        counts: As :func:`confusion` returns them, (C, C).
        skip_absent: Leave out classes that occur neither in target nor in prediction; NaN if none occurs.
    """
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = right / union.clamp(min=1)
    return 100 * (iou[union > 0] if skip_absent else iou).mean()


def mean_iou(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255, skip_absent: bool = False
) -> Tensor:
    """Return the mIoU in percent, pooled over all images before dividing; not the mean of per-image values.

    The mean is over all C classes: one that occurs nowhere counts 0, as in the papers' code.

    Args:
        pred: Classes, int (N, H, W).
        target: Classes, int (N, H, W).
        num_classes: C.
        ignore_index: Label of unlabelled pixels.
        skip_absent: For small sets: leave out classes that occur neither in target nor in prediction; NaN if none
            occurs.

    Raises:
        ShapeError: The shapes differ.
        ConfigError: A class at a labelled pixel is not one of 0 to C - 1.
    """
    return mean_iou_of_counts(confusion(pred, target, num_classes, ignore_index), skip_absent)


class MeanIoU(Metric):
    """:func:`mean_iou` over many batches and processes; torchmetrics.segmentation has the mean of per-image values."""

    full_state_update, is_differentiable, higher_is_better = False, False, True

    def __init__(self, num_classes: int, ignore_index: int = 255, skip_absent: bool = False) -> None:
        super().__init__()
        self.num_classes, self.ignore_index, self.skip_absent = num_classes, ignore_index, skip_absent
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (N, C, H, W), of which the largest counts, or classes (N, H, W); target (N, H, W)."""
        if prediction.ndim == target.ndim + 1:
            prediction = prediction.argmax(1)
        self.counts += confusion(prediction, target, self.num_classes, self.ignore_index)

    def compute(self) -> Tensor:
        """Return the pooled mIoU in percent, fp64 scalar."""
        return mean_iou_of_counts(self.counts, self.skip_absent)
