"""Singular values of a low-rank product, from its factors alone: no d_out x d_in matrix is ever formed."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.factors import RANK_TOLERANCE, LowRank


def product_svd(layer: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD (U, s, Vh) of ``scaling * B @ A`` in fp64, cut at the numerical rank rho.

    QR of both factors, then the SVD of the small core R_B R_A^T: O((d_in + d_out) r^2 + r^3). Singular values up to
    1e-8 of the largest are rounding noise and are dropped.

    Returns:
        U (d_out, rho), s (rho,) descending, Vh (rho, d_in); rho = 0 for a zero product.
    """
    q_out, r_out = torch.linalg.qr(layer.scaling * layer.B.double())
    q_in, r_in = torch.linalg.qr(layer.A.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    keep = s > RANK_TOLERANCE * s.max() if s.numel() else s > 0
    return q_out @ u[:, keep], s[keep], vh[keep] @ q_in.T


def numerical_rank(layer: LowRank) -> int:
    """Return the number of singular values of the product above 1e-8 of the largest; 0 for a zero product."""
    return len(product_svd(layer)[1])


def relative_error(approximation: LowRank, exact: LowRank) -> float:
    """Return the Frobenius norm of the difference over that of ``exact``; 0 where both are zero."""
    A = torch.cat([approximation.A.double(), exact.A.double()])
    B = torch.cat([approximation.scaling * approximation.B.double(), -exact.scaling * exact.B.double()], dim=1)
    difference = float(_norm(LowRank(A, B)))
    return difference / float(_norm(exact)) if difference else 0.0


def _norm(layer: LowRank) -> Tensor:
    """Frobenius norm of the product, from the R factors of both QR decompositions."""
    r_out = torch.linalg.qr(layer.scaling * layer.B.double(), mode="r").R
    r_in = torch.linalg.qr(layer.A.double().T, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(r_out @ r_in.T)
    return norm
