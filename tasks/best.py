"""Keep the weights of the best epoch of a training in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class BestEpoch:
    """The trained tensors of the validation with the lowest loss so far, on the CPU.

    Attributes:
        loss: That loss; infinite before the first validation.
        epoch: Its epoch, from 0; None before the first.
        tensors: By name, as they were then.
    """

    def __init__(self) -> None:
        self.loss, self.epoch = math.inf, None  # type: float, int | None
        self.tensors: dict[str, Tensor] = {}

    def offer(self, loss: float, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies if the loss is the lowest so far; of equal ones the first stays, a NaN is never the lowest."""
        if loss < self.loss:
            self.loss, self.epoch = loss, epoch
            self.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"loss": self.loss, "epoch": self.epoch, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.loss, self.epoch, self.tensors = state["loss"], state["epoch"], dict(state["tensors"])
