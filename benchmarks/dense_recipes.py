"""The textbook recipes: every closed-form method on K dense deltas of one module, as its paper writes it down.

Plain and slow on purpose; what ours is timed against. Where a method works on factors by definition (linear, LoRA-LEGO,
RobustMerge), the recipe is the factor formula followed by the dense product that one adds to a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nscmerge.factors import LowRank

Experts = Sequence[LowRank]


def deltas(experts: Experts) -> Tensor:
    """Return all dense deltas, (K, d_out, d_in)."""
    return torch.stack([e.scaling * e.B @ e.A for e in experts])


def task_arithmetic(experts: Experts) -> Tensor:
    """Sum of dense deltas."""
    return deltas(experts).sum(0)


def weight_average(experts: Experts) -> Tensor:
    """Mean of dense deltas."""
    return deltas(experts).mean(0)


def linear(experts: Experts) -> Tensor:
    """Sums of factors, then the product."""
    A = torch.stack([e.scaling**0.5 * e.A for e in experts]).sum(0)
    B = torch.stack([e.scaling**0.5 * e.B for e in experts]).sum(0)
    return B @ A


def svd(experts: Experts) -> Tensor:
    """Dense SVD of the dense sum, cut at the rank of one adapter."""
    u, s, vh = torch.linalg.svd(deltas(experts).sum(0), full_matrices=False)
    keep = max(e.rank for e in experts)
    return (u[:, :keep] * s[:keep]) @ vh[:keep]


def _ties(values: Tensor, density: float = 0.2) -> Tensor:
    """Trim, elect, disjoint mean of (K, ...) values."""
    flat = values.flatten(1)
    n = flat.shape[1]
    threshold = flat.abs().kthvalue(n - int(density * n), dim=1, keepdim=True).values
    flat = torch.where(flat.abs() >= threshold, flat, torch.zeros_like(flat))
    sign = flat.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    kept = torch.where(flat * sign > 0, flat, torch.zeros_like(flat))
    return (kept.sum(0) / (kept != 0).sum(0).clamp_min(1)).view_as(values[0])


def _dare(values: Tensor, drop: float = 0.9) -> Tensor:
    """Random drop and rescale."""
    keep = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 1 - drop
    return values * keep / (1 - drop)


def ties(experts: Experts) -> Tensor:
    """TIES on dense deltas."""
    return _ties(deltas(experts))


def dare_ties(experts: Experts) -> Tensor:
    """DARE, then TIES, on dense deltas."""
    return _ties(_dare(deltas(experts)))


def _aligned(experts: Experts) -> tuple[Tensor, Tensor]:
    """Dense SVD of the deltas side by side: basis (d_out, rho) and components (K, rho, d_in).

    In fp64, as the reference has it; in fp32 noise passes its cut of 1e-5.
    """
    side_by_side = torch.cat([e.scaling * e.B.double() @ e.A.double() for e in experts], dim=1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    keep = s > 1e-5
    parts = (s[keep, None] * vh[keep]).split(experts[0].d_in, dim=1)
    return u[:, keep].float(), torch.stack(parts).float()


def knots_ties(experts: Experts) -> Tensor:
    """KnOTS by the dense SVD of d_out x K d_in, TIES on the components."""
    u, components = _aligned(experts)
    return u @ _ties(components)


def knots_dare_ties(experts: Experts) -> Tensor:
    """KnOTS by the dense SVD, DARE and TIES on the components."""
    u, components = _aligned(experts)
    return u @ _ties(_dare(components))


def lora_lego(experts: Experts) -> Tensor:
    """k-means over rank-one units, unit by unit distances, then the product."""
    A = torch.cat([e.scaling**0.5 * e.A for e in experts])
    B = torch.cat([e.scaling**0.5 * e.B.T for e in experts])
    units = torch.cat([A, B], dim=1)
    features = torch.cat([A / (A.norm(dim=1, keepdim=True) + 1e-8), B / (B.norm(dim=1, keepdim=True) + 1e-8)], dim=1)
    k = max(e.rank for e in experts)
    centroids = features[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))[:k]].clone()
    labels = torch.zeros(len(units), dtype=torch.long)
    for _ in range(10):
        labels = (features[:, None] - centroids).square().sum(-1).argmin(1)
        for c in labels.unique():
            centroids[c] = features[labels == c].mean(0)
    merged = torch.zeros(B.shape[1], A.shape[1])
    for c in labels.unique():
        own = units[labels == c]
        mean = own.mean(0)
        mean = mean * own.abs().amax(1).mean() / (mean.abs().max() + 1e-12)
        merged += torch.outer(mean[A.shape[1] :], mean[: A.shape[1]])
    return merged


def emr(experts: Experts) -> Tensor:
    """Elect, mask, rescale on dense deltas; the unified vector (every task's masked one is made, too)."""
    values = deltas(experts)
    sign = torch.where(values.sum(0) > 0, 1.0, -1.0)
    agrees = values * sign > 0
    unified = sign * torch.where(agrees, values.abs(), torch.zeros_like(values)).amax(0)
    for value, mask in zip(values, agrees, strict=True):
        masked = unified * mask
        masked *= value.abs().mean() / masked.abs().mean()
    return unified


def free_merging(experts: Experts) -> Tensor:
    """High-pass filter of every dense delta by FFT, then the sum."""
    total = torch.zeros(experts[0].d_out, experts[0].d_in)
    for delta in deltas(experts):
        height, width = delta.shape
        i, j = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
        distance = (i.square() + j.square()).double().sqrt()
        weight = (distance <= 0.70 * min(height, width)).float() + (distance == min(height, width) // 10).float()
        total += torch.fft.ifft2(torch.fft.fft2(delta) * weight).real
    return total


def robust_merge(experts: Experts) -> Tensor:
    """Trimmed factors, rescaled rows, sums of factors, then the product."""

    def trim(factor: Tensor) -> Tensor:
        threshold = factor.abs().flatten().kthvalue(int(0.8 * factor.numel())).values
        return torch.where(factor.abs() >= threshold, factor, torch.zeros_like(factor))

    A_sum, B_sum, scales = 0.0, 0.0, 0.0
    for e in experts:
        A, B = e.scaling**0.5 * e.A, e.scaling**0.5 * e.B
        kept = trim(A)
        scale = A.abs().sum(1) / kept.abs().sum(1)
        quantile = scale.sort().values[int(0.8 * len(scale))]
        scale = scale.clamp(min=quantile)
        A_sum, B_sum, scales = A_sum + 2 * kept, B_sum + 2 * trim(B) * scale, scales + scale
    return (B_sum / scales) @ A_sum


RECIPES: dict[str, Callable[[Experts], Tensor]] = {
    f.__name__: f
    for f in (
        weight_average, task_arithmetic, linear, svd, ties, dare_ties, knots_ties, knots_dare_ties, lora_lego, emr,
        free_merging, robust_merge,
    )
}  # fmt: skip

#: Recipes that draw with a generator of their own: their numbers cannot be compared with ours, only time and memory.
DRAWN = ("dare_ties", "knots_dare_ties", "lora_lego")
