"""The null-space ratio of every sample of a fused batch: one product per layer serves all tasks (Eq. 4 of NSC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nscmerge.geometry import token_mean, training_ratio

Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Which tokens count: bool, or weights that sum to 1 over a sample; one for all target layers, or one for each.
Weight = Tensor | Mapping[str, Tensor] | None


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
    mask: Weight = None,
    *,
    reduction: Literal["sample", "flat"] = "sample",
    ratio: Ratio = training_ratio,
) -> Tensor:
    """Return Omega of every sample, (N,): mean over its task's target layers of the mean over its tokens (Eq. 4).

    Args:
        captured: ``{layer: z (N, T, d_in) or (N, d_in)}``, inputs of the target layers for the fused batch.
        row_task: int64 (N,), the task of every sample.
        bases: Row spaces by layer; a task counts at the layers where it has rows, at one of them at least.
        mask: (N, T): bool, the tokens that count, or float, weights of the tokens that sum to 1 over a sample; by layer
            where layers see different tokens. None counts all.
        reduction: ``sample``: mean over a sample's valid tokens; ``flat``: also weighted by their number, so that the
            mean over a task's samples pools all its valid tokens. The latter has a meaning for bool masks only.
        ratio: ``training_ratio`` (floored, finite gradient) or ``residual_ratio`` (exact, for reports).
    """
    means, present = [], []
    for layer, basis in bases.items():
        own = row_task[:, None] == basis.task
        omega = ratio(captured[layer], basis.rows, own)
        given = mask.get(layer) if isinstance(mask, Mapping) else mask
        # A layer that sees pooled vectors has no token dimension for the mask to fit.
        valid = given if given is not None and given.shape == omega.shape else torch.ones_like(omega, dtype=torch.bool)
        per_sample = token_mean(omega, valid)
        if reduction == "flat":
            per_sample = per_sample * _relative_size(valid.flatten(1).sum(1).to(omega.dtype), row_task)
        means.append(per_sample)
        present.append(own.any(1))
    weight = torch.stack(present).to(means[0].dtype)  # (layers, N)
    return (torch.stack(means) * weight).sum(0) / weight.sum(0)


def rows_of(mask: Weight, rows: slice | Tensor) -> Weight:
    """Return the part of a mask that belongs to some rows."""
    if mask is None:
        return None
    return {layer: own[rows] for layer, own in mask.items()} if isinstance(mask, Mapping) else mask[rows]


def _relative_size(tokens: Tensor, row_task: Tensor) -> Tensor:
    """Return every sample's tokens over the mean of its task, (N,)."""
    same = (row_task[:, None] == row_task).to(tokens.dtype)
    return tokens * same.sum(1) / (same @ tokens).clamp_min(1)
