"""Null-space compression: the mean null-space ratio of every task's own adapter on its own inputs (Eqs. 4-5 of NSC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nscmerge.batching import MASK, Group, by_length
from nscmerge.errors import ConfigError, TargetError
from nscmerge.factors import LowRank
from nscmerge.geometry import residual_ratio, row_space, token_mean, training_ratio
from nscmerge.merged_linear import MergedModel
from nscmerge.objectives.base import Objective
from nscmerge.targets import Blocks, select_targets

Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]


class Basis(NamedTuple):
    """The row spaces of all tasks at one target layer, stacked: one product serves every task of a fused batch.

    Attributes:
        rows: Orthonormal per task, (R, d_in), fp32.
        task: int64 (R,), whose row it is.
    """

    rows: Tensor
    task: Tensor


def sample_ratios(
    captured: Mapping[str, Tensor],
    row_task: Tensor,
    bases: Mapping[str, Basis],
    mask: Tensor | None = None,
    *,
    reduction: Literal["sample", "flat"] = "sample",
    ratio: Ratio = training_ratio,
) -> Tensor:
    """Return Omega of every sample, (N,): mean over its task's target layers of the mean over its tokens (Eq. 4).

    Args:
        captured: ``{layer: z (N, T, d_in) or (N, d_in)}``, inputs of the target layers for the fused batch.
        row_task: int64 (N,), the task of every sample.
        bases: Row spaces by layer; a task counts at the layers where it has rows, at one of them at least.
        mask: bool (N, T), valid tokens, or None.
        reduction: ``sample``: mean over a sample's valid tokens; ``flat``: also weighted by their number, so that the
            mean over a task's samples pools all its valid tokens.
        ratio: ``training_ratio`` (floored, finite gradient) or ``residual_ratio`` (exact, for reports).
    """
    means, present = [], []
    for layer, basis in bases.items():
        own = row_task[:, None] == basis.task
        omega = ratio(captured[layer], basis.rows, own)
        # A layer that sees pooled vectors has no token dimension for the mask to fit.
        valid = mask if mask is not None and mask.shape == omega.shape else torch.ones_like(omega, dtype=torch.bool)
        per_sample = token_mean(omega, valid)
        if reduction == "flat":
            per_sample = per_sample * _relative_size(valid.flatten(1).sum(1).to(omega.dtype), row_task)
        means.append(per_sample)
        present.append(own.any(1))
    weight = torch.stack(present).to(means[0].dtype)  # (layers, N)
    return (torch.stack(means) * weight).sum(0) / weight.sum(0)


def _relative_size(tokens: Tensor, row_task: Tensor) -> Tensor:
    """Return every sample's tokens over the mean of its task, (N,)."""
    same = (row_task[:, None] == row_task).to(tokens.dtype)
    return tokens * same.sum(1) / (same @ tokens).clamp_min(1)


class NSC(Objective):
    """The published objective, exactly: plain mean null-space ratio, unbounded below.

    Args:
        blocks: Blocks whose layers are targets: ``last_quarter``, a number of last blocks, or a list of indices.
        projections: Exact projection names; None takes the attention's output projection, else the value projection.
        reduction: Mean over tokens per sample and then over samples, or over all tokens pooled (spec 3.3).
        buckets: Run a step's samples, sorted by length, in so many passes instead of one. Same numbers within rounding;
            on a CPU less time where lengths differ, as padding is computed, too.
    """

    def __init__(
        self,
        blocks: Blocks = "last_quarter",
        projections: list[str] | None = None,
        reduction: Literal["sample", "flat"] = "sample",
        buckets: int = 1,
    ) -> None:
        super().__init__()
        if buckets < 1:
            raise ConfigError(f"buckets is {buckets}; a step takes one pass at least.")
        if buckets > 1 and reduction == "flat":
            raise ConfigError("buckets needs reduction 'sample': pooled tokens are weighed over a whole batch.")
        self.blocks, self.projections, self.reduction, self.buckets = blocks, projections, reduction, buckets
        self.targets: list[str] = []
        self._tasks: list[str] = []
        self._live: set[str] = set()  # targets that lie behind some coefficient, as far as seen
        # Parameters, not buffers: DDP broadcasts buffers before every forward pass.
        self._rows, self._owners = nn.ParameterList(), nn.ParameterList()

    def prepare(self, model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Select the target layers and compute every task's row space there, once, fp64 SVD stored in fp32.

        Raises:
            TargetError: No layer is selected, or some task's adapter has none of the selected ones.
        """
        layers = {layer for expert in experts.values() for layer in expert}
        self.targets = select_targets(model, layers, self.blocks, self.projections)
        self._tasks = list(experts)
        for task, expert in experts.items():
            if not any(t in expert for t in self.targets):
                raise TargetError(
                    f"the adapter of '{task}' has none of the target layers {_shorten(self.targets)}; its ratio is "
                    "undefined. Choose blocks and projections that every adapter has."
                )
        for target in self.targets:
            spaces = {k: row_space(e[target].A) for k, e in enumerate(experts.values()) if target in e}
            owners = torch.tensor([k for k, rows in spaces.items() for _ in rows], dtype=torch.long)
            rows = torch.cat(list(spaces.values())).float()
            self._rows.append(nn.Parameter(rows, requires_grad=False))
            self._owners.append(nn.Parameter(owners.to(rows.device), requires_grad=False))

    def options(self) -> dict[str, Any]:
        """Return block and projection choice, reduction, and the target layers that came of them."""
        return {
            "blocks": self.blocks,
            "projections": self.projections,
            "reduction": self.reduction,
            "buckets": self.buckets,
            "targets": self.targets,
        }

    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` with gradient from one truncated forward pass over the fused group."""
        samples = self.samples(merged, group, training_ratio)
        return {task: samples[rows].mean() for task, rows in group.rows.items()}

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` in the reported form, without floor."""
        samples = self.samples(merged, group, residual_ratio)
        return {task: samples[rows].mean() for task, rows in group.rows.items()}

    def samples(self, merged: MergedModel, group: Group, ratio: Ratio) -> Tensor:
        """Return Omega of every sample of the group for its own task's adapter, (N,), by truncated forward passes."""
        row_task = torch.cat(
            [torch.full((rows.stop - rows.start,), self._tasks.index(task)) for task, rows in group.rows.items()]
        )
        bases = {t: Basis(self._rows[i], self._owners[i]) for i, t in enumerate(self.targets)}
        found, order = [], []
        for rows, inputs in by_length(group, self.buckets):
            captured = merged.capture(inputs, self.targets)
            self._live.update(target for target, z in captured.items() if z.requires_grad)
            device = next(iter(captured.values())).device
            own = row_task[rows].to(device)
            mask = inputs[MASK].bool() if group.mask is not None else None
            found.append(sample_ratios(captured, own, bases, mask, reduction=self.reduction, ratio=ratio))
            order.append(rows)
        return torch.cat(found)[torch.cat(order).argsort()]


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
