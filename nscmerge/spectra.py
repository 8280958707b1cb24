"""Singular values: of a low-rank product from its factors alone, without a d_out x d_in matrix; of a dense layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nscmerge.factors import RANK_TOLERANCE, LowRank

#: Singular values of a dense fp32 matrix up to this fraction of the largest are rounding: of its entries, and of the
#: square root of an fp64 Gram matrix's eigenvalues.
DENSE_TOLERANCE = 1e-6
#: Rows of a dense matrix that are widened to fp64 at a time.
_ROWS = 4096


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


def dense_svd(matrix: Tensor, count: Callable[[Tensor], int] = len) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading part of the SVD (U, s, Vh) of a dense (d_out, d_in) matrix in fp64.

    Eigenvectors of the smaller Gram matrix, then the other side from the matrix itself, so that the product is the
    orthogonal projection of the matrix. Singular values up to 1e-6 of the largest are dropped.

    Args:
        matrix: Any shape; converted to fp64 some rows at a time.
        count: From the singular values above that bound, descending, to the number r of those that are wanted.

    Returns:
        U (d_out, r), s (r,) descending, Vh (r, d_in); r = 0 for a zero matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, uh = dense_svd(matrix.T, count)
        return uh.T, s, v.T
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for rows in _blocks(matrix):
        gram.addmm_(rows.T, rows)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    keep = eigenvalues > DENSE_TOLERANCE**2 * eigenvalues.max() if eigenvalues.numel() else eigenvalues > 0
    roots = eigenvalues[keep].sqrt().flip(0)
    v = vectors[:, keep].flip(1)[:, : count(roots)]
    us = torch.cat([rows @ v for rows in _blocks(matrix)])
    # The norms are more exact than the roots of the eigenvalues.
    s = us.norm(dim=0)
    return us / s, s, v.T


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows in fp64, some at a time: a vocabulary's embedding would double in memory."""
    for start in range(0, max(len(matrix), 1), _ROWS):
        yield matrix[start : start + _ROWS].double()


def rank_for_energy(s: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values sum to at least the share ``energy`` of their sum.

    Args:
        s: Singular values (rho,), descending.
        energy: In (0, 1]; 1 keeps all of them, whatever rounding says.
    """
    if energy == 1 or not s.numel():
        return len(s)
    sums = (s.double() ** 2).cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1


def numerical_rank(layer: LowRank) -> int:
    """Return the number of singular values of the product above 1e-8 of the largest; 0 for a zero product."""
    return len(product_svd(layer)[1])


def relative_error(approximation: LowRank, exact: LowRank) -> float:
    """Return the Frobenius norm of the difference over that of ``exact``; 0 where both are zero."""
    A = torch.cat([approximation.A.double(), exact.A.double()])
    B = torch.cat([approximation.scaling * approximation.B.double(), -exact.scaling * exact.B.double()], dim=1)
    difference = float(_norm(LowRank(A, B)))
    return difference / float(_norm(exact)) if difference else 0.0


def dense_relative_error(approximation: LowRank, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of a dense ``exact``; 0 where both are zero."""
    A, B = approximation.A.double(), approximation.scaling * approximation.B.double()
    parts = zip(_blocks(exact), _blocks(B), strict=True)
    difference = sum(float((rows - left @ A).square().sum()) for rows, left in parts)
    total = sum(float(rows.square().sum()) for rows in _blocks(exact))
    return math.sqrt(difference / total) if difference else 0.0


def _norm(layer: LowRank) -> Tensor:
    """Frobenius norm of the product, from the R factors of both QR decompositions."""
    r_out = torch.linalg.qr(layer.scaling * layer.B.double(), mode="r").R
    r_in = torch.linalg.qr(layer.A.double().T, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(r_out @ r_in.T)
    return norm
