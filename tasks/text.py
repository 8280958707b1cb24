"""A linear head on a text encoder's mean token."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tasks.base import Task


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over valid tokens, (N, T, d) and (N, T) -> (N, d); zeros where a row has none."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


class TextTask(Task):
    """Mean-pooled encoder features and one linear layer; a subclass states loss and metrics.

    Args:
        num_outputs: Width of the head.
        hidden_size: Width of the encoder's last hidden state.
    """

    def __init__(self, num_outputs: int, hidden_size: int = 384) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.linear = nn.Linear(hidden_size, num_outputs)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over valid tokens of the encoder's last hidden state, (N, hidden_size)."""
        return mean_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])

    def scores(self, features: Tensor) -> Tensor:
        """Return the head's raw output, (N, num_outputs), in the head's dtype."""
        scores: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return scores
