"""How much of a merge survives the dtype that it is stored in: a small update of a large weight may be rounded away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Share of an update that may be lost to rounding without a warning.
TOLERATED = 0.1


@dataclass
class Loss:
    """What rounding took from the update of one tensor, added up block by block.

    Args:
        squared_error: Sum of squares of what was stored of the update, minus the update.
        squared_norm: Sum of squares of the update.
        vanished: Entries of the update, not 0, that changed nothing.
        entries: Entries of the update that are not 0.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    vanished: int = 0
    entries: int = 0

    def add(self, before: Tensor, delta: Tensor, after: Tensor) -> None:
        """Count a block: the base weight in the output dtype, the update in fp32 at least, and their sum as stored."""
        stored = after.to(delta.dtype) - before.to(delta.dtype)
        self.squared_error += float((stored - delta).square().sum(dtype=torch.float64))
        self.squared_norm += float(delta.square().sum(dtype=torch.float64))
        self.vanished += int(((stored == 0) & (delta != 0)).sum())
        self.entries += int((delta != 0).sum())

    @property
    def relative_error(self) -> float:
        """|cast(W0 + D) - cast(W0) - D| / |D| (Frobenius); 0 for a zero update."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def vanished_share(self) -> float:
        """Share of the update's entries that vanish entirely, in [0, 1]; 0 for a zero update."""
        return self.vanished / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Audit:
    """What rounding took from every tensor of a merge.

    Args:
        losses: By tensor of the base model.
        dtypes: What each is stored in.
    """

    losses: Mapping[str, Loss]
    dtypes: Mapping[str, torch.dtype]

    @property
    def worst(self) -> tuple[str, float]:
        """Tensor and relative error of the worst one."""
        return max(((name, loss.relative_error) for name, loss in self.losses.items()), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """Mean relative error over tensors."""
        return sum(loss.relative_error for loss in self.losses.values()) / len(self.losses)

    @property
    def alarming(self) -> bool:
        """Whether some tensor lost more than a tenth of its update."""
        return self.worst[1] > TOLERATED

    def summary(self) -> str:
        """Return the audit in one sentence, and what to do where it is bad."""
        name, worst = self.worst
        stored = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}))
        vanished = max(loss.vanished_share for loss in self.losses.values())
        text = (
            f"rounding to {stored} takes {100 * self.mean:.2g} % of the merged update on average, {100 * worst:.2g} % "
            f"at worst ('{name}'); up to {100 * vanished:.2g} % of a tensor's entries vanish"
        )
        return text + ("; store float32, or keep the merge as an adapter" if self.alarming else "")

    def as_dict(self) -> dict[str, Any]:
        """Return it for the receipt."""
        tensors = {
            name: {
                "dtype": str(self.dtypes[name]).removeprefix("torch."),
                "relative_error": loss.relative_error,
                "vanished_share": loss.vanished_share,
            }
            for name, loss in self.losses.items()
        }
        return {"mean": self.mean, "worst": self.worst[1], "worst_tensor": self.worst[0], "tensors": tensors}
