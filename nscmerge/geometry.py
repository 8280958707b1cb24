"""Null-space geometry of a down-projection: pure tensor functions, fp64 for factors, fp32 for activations."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.errors import NSCMergeError, ShapeError
from nscmerge.factors import RANK_TOLERANCE

#: Training floor of 1 - q: keeps d sqrt(1 - q) finite as omega -> 0; below it omega reads 1e-4, gradient 0.
SQUARED_FLOOR = 1e-8
#: The Gram form loses accuracy with cond(A): 5e-5 in omega at 2e4, 2e-3 at 2e6.
MAX_GRAM_CONDITION = 1e4


def row_space(A: Tensor) -> Tensor:
    """Return an orthonormal basis Q (rho, d_in) of A's row space, fp64, rows; rho <= r is the numerical rank.

    Rank-deficient, duplicate and zero rows need no special case: an all-zero A gives (0, d_in).
    """
    if A.ndim != 2:
        raise ShapeError(f"A is {tuple(A.shape)}; expected (r, d_in).")
    _, s, vh = torch.linalg.svd(A.double(), full_matrices=False)
    basis: Tensor = vh[s > RANK_TOLERANCE * s.max()] if s.numel() else vh
    return basis


def working_dtype(z: Tensor) -> torch.dtype:
    """Return the dtype in which ratios of ``z`` are computed: fp64 for fp64, else fp32; never a half type."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _energy(z: Tensor) -> Tensor:
    """|z|^2 over the last dim, floored at the smallest normal number so that z = 0 gives q = 0, not NaN."""
    return z.square().sum(-1).clamp_min(torch.finfo(z.dtype).tiny)


def _share(z: Tensor, basis: Tensor, own: Tensor | None) -> Tensor:
    """Coordinates of z in the basis, (..., rho), zero where the row of the basis is not the sample's own."""
    coordinates = z @ basis.T
    if own is None:
        return coordinates
    return coordinates * own.reshape(len(own), *(1 for _ in z.shape[1:-1]), -1).to(z.dtype)


def training_ratio(z: Tensor, basis: Tensor, own: Tensor | None = None) -> Tensor:
    """Return omega of every token as the loss needs it: finite value and gradient everywhere.

    sqrt(max(1 - |Q z|^2 / |z|^2, 1e-8)): Eq. 6 of NSC (arXiv:2603.26317) with orthonormal rows instead of the Gram
    inverse. Leaves autocast.

    Args:
        z: Inputs of a target layer, (..., d_in), any float dtype.
        basis: Orthonormal rows (rho, d_in) from :func:`row_space`, or those of several tasks stacked.
        own: bool (N, rho): which rows of a stack belong to the task of each sample; None where all do.

    Returns:
        (...), in [1e-4, 1], fp32 (fp64 for fp64 ``z``). z = 0 gives 1 with zero gradient.
    """
    with torch.autocast(device_type=z.device.type, enabled=False):
        z = z.to(working_dtype(z))
        q = _share(z, basis.to(z.dtype), own).square().sum(-1) / _energy(z)
        return (1 - q).clamp_min(SQUARED_FLOOR).sqrt()


def residual_ratio(z: Tensor, basis: Tensor, own: Tensor | None = None) -> Tensor:
    """Return omega of every token as reports need it: |z - Q^T Q z| / |z|, exact near 0, no floor (Eq. 3 of NSC).

    Args and shape as :func:`training_ratio`; in [0, 1]; z = 0 gives 1.
    """
    with torch.autocast(device_type=z.device.type, enabled=False):
        z = z.to(working_dtype(z))
        basis = basis.to(z.dtype)
        # Norms of z / max|z| neither overflow nor underflow, whatever the scale of the activations.
        z = z / z.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        residual = z - _share(z, basis, own) @ basis
        norm = torch.linalg.vector_norm(z, dim=-1)
        omega = torch.linalg.vector_norm(residual, dim=-1) / norm.clamp_min(torch.finfo(z.dtype).tiny)
        return torch.where(norm > 0, omega, torch.ones_like(omega)).clamp(max=1)


def null_space_ratio(z: Tensor, A: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the null-space ratio omega of every token: the share of z's norm that A discards (Eq. 3 of NSC).

    Reported form (no training floor), computed from an fp64 SVD of A: any rank, any scale, any conditioning.

    Args:
        z: Inputs of the adapted layer, (..., d_in).
        A: Raw down-projection, (r, d_in). Any invertible mix of its rows gives the same ratio.
        mask: Valid tokens, bool (...), or None for all. Invalid tokens come back as 0 so that sums skip them.

    Returns:
        (...), in [0, 1], one per token; 1 where z = 0 or A = 0.

    Raises:
        ShapeError: Widths of z and A differ, or the mask does not fit.
    """
    if z.shape[-1:] != A.shape[-1:]:
        raise ShapeError(f"z is {tuple(z.shape)} and A is {tuple(A.shape)}; their last dimension d_in must agree.")
    omega = residual_ratio(z, row_space(A).to(z.device))
    if mask is None:
        return omega
    if mask.shape != omega.shape:
        raise ShapeError(f"mask is {tuple(mask.shape)}; expected one entry per token, {tuple(omega.shape)}.")
    return torch.where(mask.bool(), omega, torch.zeros_like(omega))


def gram_ratio(z: Tensor, A: Tensor) -> Tensor:
    """Return omega by the papers' own Gram form, Eq. 6 of NSC: sqrt(1 - y^T (A A^T)^-1 y / |z|^2), y = A z.

    Kept as the papers' form and as a check of the orthonormal one; triangular solve instead of an inverse.

    Args:
        z: (..., d_in).
        A: (r, d_in), raw; condition number at most 1e4.

    Raises:
        NSCMergeError: A is too ill-conditioned for this form.
    """
    condition = float(torch.linalg.cond(A.double()))
    if not condition <= MAX_GRAM_CONDITION:
        raise NSCMergeError(
            f"A has condition number {condition:.1e}; the Gram form is good up to {MAX_GRAM_CONDITION:.0e}. "
            "Use null_space_ratio, which has no such limit."
        )
    cholesky = torch.linalg.cholesky(A.double() @ A.double().T)
    z = z.double()
    y = torch.linalg.solve_triangular(cholesky, (z @ A.double().T).flatten(0, -2).T, upper=False)
    q = y.square().sum(0).reshape(z.shape[:-1]) / _energy(z)
    omega: Tensor = (1 - q).clamp_min(SQUARED_FLOOR).sqrt()
    return omega


def token_mean(omega: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over valid tokens of every sample, (N, ...) -> (N,).

    Args:
        omega: (N, T) or (N, ...) ratios; extra dimensions count as tokens.
        mask: bool (N, T), same shape as ``omega``, or None. A sample without a valid token gives 0.
    """
    omega = omega.flatten(1) if omega.ndim > 1 else omega.unsqueeze(1)
    if mask is None:
        return omega.mean(1)
    mask = mask.reshape(omega.shape).to(omega.dtype)
    return (omega * mask).sum(1) / mask.sum(1).clamp_min(1)
