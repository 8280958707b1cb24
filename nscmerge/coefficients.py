"""Merge coefficients lambda as parameters: layer-wise or task-wise, start value, range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nscmerge.errors import ConfigError


class KeepsPrecision(nn.Module):
    """A module whose tensors follow device moves but no cast: a half-precision trainer must not round geometry."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        return super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call, no-any-return]


class Coefficients(KeepsPrecision):
    """One real scalar per task and layer, fp32.

    One parameter of shape (T,) per layer rather than one of (L, T): a layer that no target can reach then has no
    gradient at all, and AdamW leaves it alone instead of decaying it.

    Args:
        layers: L layer names, in the order of the rows.
        tasks: T task names, in the order of the columns.
        init: Start value of every coefficient, no unit; 0 is the base model, 1 adds a task's whole update.
        granularity: ``layer`` for (L, T) coefficients; ``task`` for T, shared by all layers.
        bounds: (low, high) to clamp to in the forward pass, zero gradient outside; None leaves them free.

    Raises:
        ConfigError: ``bounds`` is no interval that holds ``init``.
    """

    def __init__(
        self,
        layers: Sequence[str],
        tasks: Sequence[str],
        *,
        init: float = 0.4,
        granularity: Literal["layer", "task"] = "layer",
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if bounds is not None and not bounds[0] <= init <= bounds[1]:
            raise ConfigError(f"bounds {bounds} do not hold the start value {init}; widen them or move init inside.")
        self.layers, self.tasks = tuple(layers), tuple(tasks)
        self.init, self.bounds, self.granularity = float(init), bounds, granularity
        self.lam = nn.ParameterList()
        self._add(len(self.layers) if granularity == "layer" else 1)

    def extend(self, layers: Sequence[str]) -> None:
        """Add rows for more layers, at the start value; before an optimizer takes the parameters."""
        self.layers += tuple(layers)
        if self.granularity == "layer":
            self._add(len(layers))

    def _add(self, rows: int) -> None:
        # Their own dtype: a trainer may have made another one the default.
        start = (torch.full((len(self.tasks),), self.init, dtype=torch.float32) for _ in range(rows))
        self.lam.extend(nn.Parameter(row) for row in start)

    def row(self, layer: int) -> Tensor:
        """Return the coefficients of one layer, (T,), with gradient."""
        raw: Tensor = self.lam[layer if self.granularity == "layer" else 0]
        return raw if self.bounds is None else raw.clamp(*self.bounds)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return all coefficients, (L, T), fp32, detached copy; task-wise ones repeated over the layers."""
        return torch.stack([self.row(i) for i in range(len(self.layers))]).clone()
