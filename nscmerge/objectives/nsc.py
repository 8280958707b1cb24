"""Null-space compression: the mean null-space ratio of every task's own adapter on its own inputs (Eqs. 4-5 of NSC)."""

from __future__ import annotations

import itertools
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
#: ``{layer: z}``, inputs of the target layers.
Captured = Mapping[str, Tensor]
Places = slice | Tensor


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
        self._spans: list[dict[int, slice]] = []  # by target: which of its rows are whose

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
            ends = list(itertools.accumulate(map(len, spaces.values())))
            self._spans.append({k: slice(e - len(s), e) for (k, s), e in zip(spaces.items(), ends, strict=True)})
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
        return {task: omega.mean() for task, omega in self.samples(merged, group, training_ratio).items()}

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` in the reported form, without floor."""
        return {task: omega.mean() for task, omega in self.samples(merged, group, residual_ratio).items()}

    def samples(self, merged: MergedModel, group: Group, ratio: Ratio) -> dict[str, Tensor]:
        """Return ``{task: Omega of each of its samples}`` for the task's own adapter, by truncated forward passes.

        A row that several tasks share runs once and counts for each of them.
        """
        of_part = self._shared_ratios if group.shared else self._own_ratios
        parts = []
        for rows, inputs in by_length(group, self.buckets):
            captured = merged.capture(inputs, self.targets)
            self._live.update(target for target, z in captured.items() if z.requires_grad)
            mask = inputs[MASK].bool() if group.mask is not None else None
            # A part sorted by length may hold nothing of some task.
            places = {t: own for t, r in group.rows.items() if _count(own := _places(rows, r))}
            parts.append((rows, places, of_part(captured, mask, places, ratio)))
        if len(parts) == 1:
            return parts[0][2]
        whole = {}
        for task in group.rows:
            mine = [(rows[places[task]], omega[task]) for rows, places, omega in parts if task in places]
            order = torch.cat([rows for rows, _ in mine]).argsort()
            whole[task] = torch.cat([omega for _, omega in mine])[order]
        return whole

    def _own_ratios(
        self, captured: Captured, mask: Tensor | None, places: Mapping[str, Places], ratio: Ratio
    ) -> dict[str, Tensor]:
        """Return every task's ratios where each row has one task: one product with all row spaces serves them all.

        Args:
            captured: Inputs of the target layers, n rows.
            mask: bool (n, T), valid tokens, or None.
            places: Which of the n rows are whose.
            ratio: As for :func:`sample_ratios`.
        """
        z = next(iter(captured.values()))
        task_of = torch.empty(len(z), dtype=torch.long)
        for task, own in places.items():
            task_of[own] = self._tasks.index(task)
        bases = {t: Basis(self._rows[i], self._owners[i]) for i, t in enumerate(self.targets)}
        omega = sample_ratios(captured, task_of.to(z.device), bases, mask, reduction=self.reduction, ratio=ratio)
        return {task: omega[own] for task, own in places.items()}

    def _shared_ratios(
        self, captured: Captured, mask: Tensor | None, places: Mapping[str, Places], ratio: Ratio
    ) -> dict[str, Tensor]:
        """As :meth:`_own_ratios`, where rows have several tasks: each task reads its rows of what all captured."""
        found = {}
        for task, own in places.items():
            k = self._tasks.index(task)
            bases = {t: self._basis(i, k) for i, t in enumerate(self.targets) if k in self._spans[i]}
            seen = {t: captured[t][own] for t in bases}
            z = next(iter(seen.values()))
            owner = torch.zeros(len(z), dtype=torch.long, device=z.device)
            valid = mask[own] if mask is not None else None
            found[task] = sample_ratios(seen, owner, bases, valid, reduction=self.reduction, ratio=ratio)
        return found

    def _basis(self, target: int, task: int) -> Basis:
        """One task's row space at a target, its rows numbered as if there were no other task."""
        rows = self._rows[target][self._spans[target][task]]
        return Basis(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))


def _places(rows: Tensor, own: slice) -> Places:
    """Return where in ``rows`` those of ``own`` stand; a slice, which copies nothing, where ``rows`` count up by 1."""
    if bool((rows.diff() == 1).all()):
        start, stop = (min(max(end - int(rows[0]), 0), len(rows)) for end in (own.start, own.stop))
        return slice(start, stop)
    found: Tensor = ((rows >= own.start) & (rows < own.stop)).nonzero().flatten()
    return found


def _count(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
