"""RobustMerge: trimmed factors, rescaled row by row by what the trimming took away, then added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nscmerge.factors import LowRank, check_same_layer
from nscmerge.methods.options import check_number
from nscmerge.methods.stacking import check_equal_ranks, rooted, working_dtype

#: Factor of the authors' code on A and on B; part of the unit merge, so lambda multiplies on top of it.
FUSE = 2.0
#: Row scales below this quantile of a task's own ones are raised to it.
CLAMP_QUANTILE = 0.8


def robust_merge(experts: Sequence[LowRank], *, lam: float = 1.0, density: float = 0.2) -> LowRank:
    """Return ``lam * (sum_k 2 B~_k diag(S_k / sum_j S_j)) (sum_k 2 A~_k)`` of one layer, of the common rank.

    A~_k and B~_k are trimmed to their largest entries, each matrix by itself; S_k (r) is how much larger a row of A_k
    was before the trim, in L1, with values below the 80 % quantile raised to it. The product holds cross terms.

    Departures from the authors' code: a row of A_k that the trim empties has no finite S and becomes NaN there; here it
    takes the task's largest finite one (1 if there is none). Scaling enters as sqrt(s_k) on both factors; the code uses
    the first task's on the product.

    Args:
        experts: One layer of K adapters of the same rank: A (r, d_in), B (d_out, r), scaling s_k >= 0.
        lam: Merge coefficient, no unit; it multiplies the product once.
        density: Share of entries kept, in (0, 1]: those not below the ``int((1 - density) n)``-th smallest of n.

    Raises:
        ShapeError: The experts differ in d_in, d_out or rank.
        MethodError: ``density`` is out of range, or a scaling is negative.

    Source: Zeng et al., arXiv:2502.17159 and its code (whose clamp and twofold 2 are not in the paper).
    """
    full = _factors(experts, density)
    trimmed = [(trim(A, density), trim(B, density)) for A, B in full]
    scales = []
    for (whole, _), (A, _) in zip(full, trimmed, strict=True):
        ratio = whole.abs().sum(1) / A.abs().sum(1)
        finite = ratio[torch.isfinite(ratio)]
        largest = finite.max() if len(finite) else torch.ones_like(ratio[0])
        ratio = torch.where(torch.isfinite(ratio), ratio, largest)
        # At int(0.8 r)-th place, so ranks up to 5 raise every row to the maximum.
        scales.append(ratio.clamp(min=ratio.sort().values[int(CLAMP_QUANTILE * len(ratio))]))
    total = torch.stack(scales).sum(0)
    merged_a = torch.stack([FUSE * A for A, _ in trimmed]).sum(0)
    merged_b = torch.stack([FUSE * B * (S / total) for (_, B), S in zip(trimmed, scales, strict=True)]).sum(0)
    dtype = working_dtype(experts)
    return LowRank(merged_a.to(dtype), (lam * merged_b).to(dtype))


def robust_merge_per_task(experts: Sequence[LowRank], *, lam: float = 1.0, density: float = 0.8) -> LowRank:
    """Return ``lam * sum_k 2 B~_k diag(S_k / sum_j S_j) A~_k`` of one layer, of rank K r.

    As the NSC authors' code has it: it keeps the largest 80 % where the paper keeps 20 %, does not clamp, forms one
    product per task (no cross terms), and adds 1e-6 to both denominators: each row sum of |A~_k|, and the sum of S.

    Args:
        experts: One layer of K adapters of the same rank: A (r, d_in), B (d_out, r), scaling s_k >= 0.
        lam: Merge coefficient, no unit.
        density: Share of entries kept, in (0, 1]: those not below the ``int((1 - density) n)``-th smallest of n.

    Raises:
        ShapeError: The experts differ in d_in, d_out or rank.
        MethodError: ``density`` is out of range, or a scaling is negative.

    Source: code of the NSC authors' earlier TARA-Merge, function RobustMerge.
    """
    full = _factors(experts, density)
    trimmed = [(trim(A, density), trim(B, density)) for A, B in full]
    scales = [whole.abs().sum(1) / (A.abs().sum(1) + 1e-6) for (whole, _), (A, _) in zip(full, trimmed, strict=True)]
    total = torch.stack(scales).sum(0) + 1e-6
    A = torch.cat([A for A, _ in trimmed])
    B = torch.cat([FUSE * B * (S / total) for (_, B), S in zip(trimmed, scales, strict=True)], dim=1)
    dtype = working_dtype(experts)
    return LowRank(A.to(dtype), (lam * B).to(dtype))


def _factors(experts: Sequence[LowRank], density: float) -> list[tuple[Tensor, Tensor]]:
    """Return every task's (A, B) in fp64, sqrt(s_k) included, after checking what both variants need."""
    check_number("robust_merge", "density", density, "(0, 1]")
    check_same_layer(experts)
    check_equal_ranks(experts, "robust_merge")
    return rooted(experts, "robust_merge", torch.float64)


def trim(factor: Tensor, density: float) -> Tensor:
    """Return ``factor`` with entries below its ``int((1 - density) n)``-th smallest magnitude set to 0.

    That keeps ``n - int((1 - density) n) + 1`` of the n entries, and all where the count is 0.
    """
    size = factor.abs()
    if (place := int((1 - density) * factor.numel())) == 0:
        return factor
    return torch.where(size >= size.flatten().kthvalue(place).values, factor, 0)
