"""The edge loss that the papers' code reports, as a diagnostic beside ods-F."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from nscmerge.errors import ShapeError

#: Weight of edge pixels; 1 minus it is the weight of all others.
WEIGHT = 0.95


def edge_losses(probabilities: Tensor, target: Tensor, weight: float = WEIGHT) -> tuple[Tensor, Tensor]:
    """Return the sum of losses, fp64, and the number of valid pixels, int64; args and errors as below."""
    probabilities, target = torch.as_tensor(probabilities), torch.as_tensor(target)
    if probabilities.shape != target.shape:
        raise ShapeError(
            f"probabilities are {tuple(probabilities.shape)}, target {tuple(target.shape)}; both must agree."
        )
    valid = target != 255
    x, y = probabilities[valid].double(), target[valid].double()
    losses = weight * y * nn.functional.softplus(-x) + (1 - weight) * (1 - y) * nn.functional.softplus(x)
    return losses.sum(), valid.sum()


def edge_reference_loss(probabilities: Tensor, target: Tensor, weight: float = WEIGHT) -> Tensor:
    """Return the weighted cross-entropy with the probabilities used as logits, fp64; lower is better; NaN if no pixel.

    The papers' code applies the sigmoid to the network's output and then hands it to a loss that expects logits. The
    all-zero map scores 0.0347 + 0.624 d on maps of edge density d, below a usefully trained detector, so this ranks
    collapsed models first: read it beside ods-F, never alone.

    Args:
        probabilities: Of being an edge, in [0, 1], (N, H, W).
        target: (N, H, W): 0, 1, or 255 where not valid.
        weight: Of edge pixels.

    Raises:
        ShapeError: The shapes differ.
    """
    total, count = edge_losses(probabilities, target, weight)
    return total / count


class EdgeReferenceLoss(Metric):
    """:func:`edge_reference_loss` over many batches and processes."""

    full_state_update, is_differentiable, higher_is_better = False, True, False

    def __init__(self, weight: float = WEIGHT) -> None:
        super().__init__()
        self.weight = weight
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (N, H, W), and labels (N, 2, H, W), of which channel 0 is read."""
        total, count = edge_losses(prediction.double().sigmoid(), target[:, 0], self.weight)
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the pooled loss, fp64 scalar."""
        return self.total / self.count
