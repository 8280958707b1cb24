"""Null-space compression: the mean null-space ratio of every task's own adapter on its own inputs (Eqs. 4-5 of NSC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nscmerge.batching import Group
from nscmerge.errors import TargetError
from nscmerge.factors import LowRank
from nscmerge.geometry import residual_ratio, row_space, token_mean, training_ratio
from nscmerge.merged_linear import MergedModel
from nscmerge.objectives.base import Objective
from nscmerge.targets import Blocks, select_targets

Ratio = Callable[[Tensor, Tensor], Tensor]


def mean_ratio(
    captured: Mapping[str, Tensor],
    rows: slice,
    bases: Mapping[str, Tensor],
    mask: Tensor | None = None,
    *,
    reduction: Literal["sample", "flat"] = "sample",
    ratio: Ratio = training_ratio,
) -> Tensor:
    """Return one task's Omega: mean over its target layers of the mean over its samples (Eq. 4), a scalar.

    Args:
        captured: ``{layer: z (N, T, d_in) or (N, d_in)}``, inputs of the target layers for the fused batch.
        rows: This task's rows of the fused batch.
        bases: ``{layer: orthonormal rows (rho, d_in) of this task's A}``; its keys are the layers that count.
        mask: bool (N, T), valid tokens, or None.
        reduction: ``sample``: mean over a sample's valid tokens, then over samples; ``flat``: all valid tokens pooled.
        ratio: ``training_ratio`` (floored, finite gradient) or ``residual_ratio`` (exact, for reports).
    """
    own_mask = None if mask is None else mask[rows]
    per_layer = []
    for layer, basis in bases.items():
        omega = ratio(captured[layer][rows], basis)
        # A layer that sees pooled vectors has no token dimension for the mask to fit.
        valid = own_mask if own_mask is not None and own_mask.shape == omega.shape else None
        if reduction == "flat" and valid is not None:
            per_layer.append((omega * valid).sum() / valid.sum().clamp_min(1))
        else:
            per_layer.append(token_mean(omega, valid).mean())
    return torch.stack(per_layer).mean()


class NSC(Objective):
    """The published objective, exactly: plain mean null-space ratio, unbounded below.

    Args:
        blocks: Blocks whose layers are targets: ``last_quarter``, a number of last blocks, or a list of indices.
        projections: Exact projection names; None takes the attention's output projection, else the value projection.
        reduction: Mean over tokens per sample and then over samples, or over all tokens pooled (spec 3.3).
    """

    def __init__(
        self,
        blocks: Blocks = "last_quarter",
        projections: list[str] | None = None,
        reduction: Literal["sample", "flat"] = "sample",
    ) -> None:
        super().__init__()
        self.blocks, self.projections, self.reduction = blocks, projections, reduction
        self.targets: list[str] = []
        self._index: dict[tuple[str, str], int] = {}
        self._bases = nn.ParameterList()  # parameters, not buffers: DDP broadcasts buffers before every forward pass

    def prepare(self, model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Select the target layers and compute every task's row space there, once, fp64 SVD stored in fp32.

        Raises:
            TargetError: No layer is selected, or some task's adapter has none of the selected ones.
        """
        layers = {layer for expert in experts.values() for layer in expert}
        self.targets = select_targets(model, layers, self.blocks, self.projections)
        for task, expert in experts.items():
            own = [t for t in self.targets if t in expert]
            if not own:
                raise TargetError(
                    f"the adapter of '{task}' has none of the target layers {_shorten(self.targets)}; its ratio is "
                    "undefined. Choose blocks and projections that every adapter has."
                )
            for layer in own:
                self._index[task, layer] = len(self._bases)
                basis = row_space(expert[layer].A).to(torch.float32)
                self._bases.append(nn.Parameter(basis, requires_grad=False))

    def options(self) -> dict[str, Any]:
        """Return block and projection choice, reduction, and the target layers that came of them."""
        return {
            "blocks": self.blocks,
            "projections": self.projections,
            "reduction": self.reduction,
            "targets": self.targets,
        }

    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` with gradient from one truncated forward pass over the fused group."""
        captured = merged.capture(group.inputs, self.targets)
        return self._means(captured, group, training_ratio)

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` in the reported form, without floor."""
        captured = merged.capture(group.inputs, self.targets)
        return self._means(captured, group, residual_ratio)

    def _means(self, captured: Mapping[str, Tensor], group: Group, ratio: Ratio) -> dict[str, Tensor]:
        return {
            task: mean_ratio(captured, rows, self._own_bases(task), group.mask, reduction=self.reduction, ratio=ratio)
            for task, rows in group.rows.items()
        }

    def _own_bases(self, task: str) -> dict[str, Tensor]:
        return {layer: self._bases[i] for (owner, layer), i in self._index.items() if owner == task}


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
