"""Cut the rank of any method's result, so that a dense merge becomes a plain adapter and a wide one a small one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nscmerge.factors import LowRank
from nscmerge.lazy import Lazy
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_number, check_whole
from nscmerge.progress import Watch, quiet
from nscmerge.spectra import dense_relative_error, dense_svd, product_svd, rank_for_energy, relative_error


def check_truncation(method: str, rank: int | None, energy: float | None) -> None:
    """Raise unless both are None or in their range.

    Raises:
        MethodError: ``rank`` is not a whole number >= 1, or ``energy`` not in (0, 1].
    """
    if rank is not None:
        check_whole(method, "rank", rank, at_least=1)
    if energy is not None:
        check_number(method, "energy", energy, "(0, 1]")


def truncate(merged: Merged, rank: int | None, energy: float | None, watch: Watch = quiet) -> Merged:
    """Return the result with every layer as factors, cut at ``rank`` or ``energy``; per-task weights too.

    Whole tensors beside LoRA stay as they are. Layers are cut now, one at a time, each dense one by an exact SVD (tens
    of seconds for 4096 x 4096 on one core). The errors of per-task layers are found under ``tasks/<task>/<layer>``.

    Args:
        merged: What a method made; its per-task weights name layers as ``merged.layers`` does.
        rank: Largest rank to keep; None for any.
        energy: Share of the squared singular values to keep at least, in (0, 1]; None for all.
        watch: Wraps the loops over layers.
    """
    errors = dict(merged.relative_error)
    layers = _cut(merged.layers, merged.layers, rank, energy, watch, errors, "")
    per_task: dict[str, Mapping[str, LowRank | Tensor]] = {}
    for task, weights in merged.per_task.items():
        own = _cut(weights, merged.layers, rank, energy, watch, errors, f"tasks/{task}/")
        per_task[task] = _overlaid(own, weights)
    return replace(merged, layers=layers, per_task=per_task, relative_error=errors)


def _cut(
    weights: Mapping[str, LowRank | Tensor],
    layers: Mapping[str, LowRank | Tensor],
    rank: int | None,
    energy: float | None,
    watch: Watch,
    errors: dict[str, float],
    prefix: str,
) -> dict[str, LowRank]:
    """Return those of ``weights`` that are layers, cut; note in ``errors`` what that took from each."""
    found = {}
    for name in watch([n for n in weights if n in layers], "truncating"):
        found[name], error = truncate_layer(weights[name], rank, energy)
        if error is not None:
            errors[prefix + name] = error
    return found


def _overlaid(own: Mapping[str, LowRank], weights: Mapping[str, LowRank | Tensor]) -> Lazy[LowRank | Tensor]:
    return Lazy(list(weights), lambda name: own[name] if name in own else weights[name])


def truncate_layer(weight: LowRank | Tensor, rank: int | None, energy: float | None) -> tuple[LowRank, float | None]:
    """Return the best approximation of one layer at a rank, as B = U diag(s), A = Vh, and its relative error.

    Args:
        weight: Factors, or a dense (d_out, d_in) delta.
        rank: Largest rank to keep; beyond the numerical rank there is nothing to keep. None for any.
        energy: Share of the squared singular values to keep at least, in (0, 1]; with ``rank`` the smaller one counts.

    Returns:
        Factors in fp32 at least, and |truncated - exact| / |exact| (Frobenius): None where factors lost nothing; for a
        dense layer always measured, what rounding takes included.
    """

    def count(s: Tensor) -> int:
        return min(len(s), rank or len(s), len(s) if energy is None else rank_for_energy(s, energy))

    u, s, vh = product_svd(weight) if isinstance(weight, LowRank) else dense_svd(weight, count)
    keep = count(s) if isinstance(weight, LowRank) else len(s)
    stored = torch.promote_types(weight.A.dtype, weight.B.dtype) if isinstance(weight, LowRank) else weight.dtype
    dtype = torch.promote_types(stored, torch.float32)
    low = LowRank(vh[:keep].to(dtype), (u[:, :keep] * s[:keep]).to(dtype))
    if isinstance(weight, Tensor):
        return low, dense_relative_error(low, weight)
    return low, relative_error(low, weight) if keep < len(s) else None
