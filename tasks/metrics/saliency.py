"""Saliency: best mean Jaccard index and best F-measure over thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ShapeError

#: 0.2 to 0.9 and 0.05 to 0.95 in steps of 0.05.
JACCARD_THRESHOLDS = tuple(k / 20 for k in range(4, 19))
F_THRESHOLDS = tuple(k / 20 for k in range(1, 20))
BETA_SQUARED = 0.3
IGNORE = 255


def positives(probability: Tensor, mask: Tensor, thresholds: Sequence[float], strict: bool) -> Tensor:
    """Return per threshold the numbers of true, predicted and actual positives among valid pixels, int64 (T, 3).

    Args:
        probability: Of being salient, (H, W); a NaN counts as 0.
        mask: (H, W): 0 background, 1 salient, 255 not valid.
        thresholds: Ascending, T of them; they are compared in the probability's own dtype.
        strict: Predicted is what is above a threshold; otherwise what is at it, too.

    Raises:
        ShapeError: The two are not (H, W) of one size.
    """
    probability, mask = torch.as_tensor(probability), torch.as_tensor(mask)
    if probability.ndim != 2 or probability.shape != mask.shape:
        raise ShapeError(f"probability is {tuple(probability.shape)}, mask {tuple(mask.shape)}; expected (H, W) twice.")
    valid = mask != IGNORE
    value, salient = probability[valid].nan_to_num(0.0), (mask[valid] != 0).long()
    levels = torch.tensor(thresholds, dtype=value.dtype, device=value.device)
    # Every pixel passes the first few thresholds: count pixels by that number, then sum from the top.
    passed = torch.bucketize(value, levels, right=not strict)
    bins = len(thresholds) + 1
    counts = torch.bincount(salient * bins + passed, minlength=2 * bins).reshape(2, bins)
    above = counts.flip(1).cumsum(1).flip(1)[:, 1:]
    return torch.stack([above[1], above.sum(0), counts[1].sum().expand(len(thresholds))], dim=1)


def jaccards(counts: Tensor) -> Tensor:
    """Return per threshold the Jaccard index of one image's salient region, fp64 (T,); 1 where both are empty."""
    right, predicted, actual = counts.unbind(1)
    union = predicted + actual - right
    return torch.where(union == 0, 1.0, right.double() / union.clamp(min=1))


def best_f(counts: Tensor) -> Tensor:
    """Return the largest F-measure over thresholds, fp64, from pooled counts (T, 3); 0 where it is not defined.

    1.3 P R / (0.3 P + R), written with counts so that nothing is divided by zero.
    """
    right, predicted, actual = counts.double().unbind(1)
    below = BETA_SQUARED * actual + predicted
    return torch.where(below == 0, 0.0, (1 + BETA_SQUARED) * right / below.clamp(min=1e-12)).max()


def saliency_miou(probabilities: Iterable[Tensor], masks: Iterable[Tensor]) -> Tensor:
    """Return the best over thresholds 0.2 to 0.9 of the mean over images of the salient region's Jaccard index.

    In [0, 1], fp64; NaN without images. Valid pixels alone count; a region that is empty in both counts 1.

    Args:
        probabilities: Of being salient, one (H, W) per image.
        masks: As many, (H, W): 0 background, 1 salient, 255 not valid.

    Raises:
        ShapeError: A probability and its mask differ in size.
    """
    values = [jaccards(positives(p, m, JACCARD_THRESHOLDS, True)) for p, m in zip(probabilities, masks, strict=True)]
    return torch.stack(values).mean(0).max() if values else torch.tensor(torch.nan, dtype=torch.float64)


def saliency_max_f(probabilities: Iterable[Tensor], masks: Iterable[Tensor]) -> Tensor:
    """Return the best F-measure over thresholds 0.05 to 0.95, beta squared 0.3, from counts pooled over all images.

    In [0, 1], fp64; 0 if nothing is salient. Args and errors as :func:`saliency_miou`.
    """
    return best_f(_pooled(probabilities, masks))


def saliency_max_f_double_sigmoid(probabilities: Iterable[Tensor], masks: Iterable[Tensor]) -> Tensor:
    """Return :func:`saliency_max_f` of the sigmoid of the probabilities, for comparison with published code only.

    That code passes the probability through a sigmoid again, so that only the thresholds 0.55, 0.6, 0.65 and 0.7 act,
    at 0.2007, 0.4055, 0.6190 and 0.8473.
    """
    return best_f(_pooled((torch.as_tensor(p).sigmoid() for p in probabilities), masks))


class SaliencyMIoU(Metric):
    """:func:`saliency_miou` over many batches and processes."""

    full_state_update, is_differentiable, higher_is_better = False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("jaccard", torch.zeros(len(JACCARD_THRESHOLDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (N, 2, H, W), channel 1 salient, and masks (N, H, W)."""
        for probability, mask in zip(salient_probability(prediction), target, strict=True):
            self.jaccard += jaccards(positives(probability, mask, JACCARD_THRESHOLDS, True))
            self.images += 1

    def compute(self) -> Tensor:
        """Return the best mean index in [0, 1], fp64 scalar."""
        return (self.jaccard / self.images).max()


class SaliencyMaxF(Metric):
    """:func:`saliency_max_f` over many batches and processes."""

    full_state_update, is_differentiable, higher_is_better = False, False, True
    # Subclasses name their state anew: a MetricCollection takes metrics for one if states agree after the first batch.
    _state = "positives"

    def __init__(self) -> None:
        super().__init__()
        self.add_state(self._state, torch.zeros(len(F_THRESHOLDS), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (N, 2, H, W), channel 1 salient, and masks (N, H, W)."""
        setattr(self, self._state, getattr(self, self._state) + _pooled(self._probability(prediction), target))

    def compute(self) -> Tensor:
        """Return the best F-measure in [0, 1], fp64 scalar."""
        return best_f(getattr(self, self._state))

    def _probability(self, prediction: Tensor) -> Tensor:
        return salient_probability(prediction)


class SaliencyMaxFDoubleSigmoid(SaliencyMaxF):
    """:func:`saliency_max_f_double_sigmoid` over many batches and processes."""

    _state = "double_sigmoid_positives"

    def _probability(self, prediction: Tensor) -> Tensor:
        return salient_probability(prediction).sigmoid()


def salient_probability(logits: Tensor) -> Tensor:
    """Return the probability of being salient, float32 or finer, (N, H, W), of logits (N, 2, H, W).

    Raises:
        ShapeError: Not two classes.
    """
    if logits.ndim != 4 or logits.shape[1] != 2:
        raise ShapeError(f"logits are {tuple(logits.shape)}; expected (N, 2, H, W): background and salient.")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)[:, 1]


def _pooled(probabilities: Iterable[Tensor], masks: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(len(F_THRESHOLDS), 3, dtype=torch.int64)
    for probability, mask in zip(probabilities, masks, strict=True):
        counts = positives(probability, mask, F_THRESHOLDS, False)
        total = total.to(counts.device) + counts
    return total
