"""Matrices of continual merging, as factors or whole: sums, thin SVDs under the rank rule, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nscmerge.continual.state import Weight
from nscmerge.factors import LowRank
from nscmerge.spectra import dense_svd

#: Largest smaller side of a dense matrix that goes through ``linalg.svd``; beyond it the fp64 Gram matrix does.
LARGEST_SVD = 4096


def rank_of(s: Tensor, d_out: int, d_in: int, dtype: torch.dtype) -> int:
    """Return how many singular values lie above 16 max(d_out, d_in) eps(dtype) sigma_1: the rank rule.

    Args:
        s: Singular values, descending, (n,).
        d_out: Rows of the matrix.
        d_in: Its columns.
        dtype: In which the matrix was held; fp64 for factors.

    Source: continual merging specification, section 1. Vectors beyond the rank are arbitrary: a change of basis of
    input or output would move the result.
    """
    if not s.numel():
        return 0
    return int((s > 16 * max(d_out, d_in) * torch.finfo(dtype).eps * s[0]).sum())


def thin_svd(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD (U, s, Vh) of a matrix, cut at its rank (:func:`rank_of`).

    Factors: QR of both and the SVD of the small core, O((d_out + d_in) r^2 + r^3), in fp64. Dense: exact, in the
    matrix's own dtype (fp32 at least); past 4096 from the smaller Gram matrix in fp64.

    Returns:
        U (d_out, rho), s (rho,) descending, Vh (rho, d_in); rho = 0 for a zero matrix.
    """
    if isinstance(weight, Tensor):
        weight = at_least_fp32(weight)
        if min(weight.shape) > LARGEST_SVD:
            u, s, vh = (x.to(weight.dtype) for x in dense_svd(weight))
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        rho = rank_of(s, weight.shape[0], weight.shape[1], weight.dtype)
        return u[:, :rho], s[:rho], vh[:rho]
    A, B = factors(weight)
    q_out, r_out = torch.linalg.qr(B)
    q_in, r_in = torch.linalg.qr(A.T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    rho = rank_of(s, weight.d_out, weight.d_in, torch.float64)
    return q_out @ u[:, :rho], s[:rho], vh[:rho] @ q_in.T


def factors(layer: LowRank) -> tuple[Tensor, Tensor]:
    """Return (A, s B) in fp64."""
    return layer.A.double(), layer.scaling * layer.B.double()


def compress(layer: LowRank) -> LowRank:
    """Return the same product at its rank: A = Vh, B = U diag(s), fp64. Exact."""
    u, s, vh = thin_svd(layer)
    return LowRank(vh, u * s)


def capped(layer: LowRank) -> LowRank:
    """Return the layer, compressed once it holds more than min(d_out, d_in) / 2 rows."""
    return compress(layer) if 2 * layer.rank > min(layer.d_out, layer.d_in) else layer


def combine(*terms: tuple[float, Weight]) -> Weight:
    """Return ``sum_k c_k X_k``: factors (fp64, scaling 1) side by side where all are factors, else a dense tensor.

    Terms with c = 0 or a zero factor fall away; a single one left over is only scaled, in its own dtype.

    Args:
        *terms: Pairs (c_k, X_k) of one shape.
    """
    some = [(c, x) for c, x in terms if c and not (isinstance(x, LowRank) and not (x.A.any() and x.B.any()))]
    if not some:
        first = terms[0][1]
        return LowRank(first.A[:0], first.B[:, :0]) if isinstance(first, LowRank) else torch.zeros_like(first)
    if len(some) == 1:
        ((c, x),) = some
        return LowRank(x.A, x.B, c * x.scaling) if isinstance(x, LowRank) else c * at_least_fp32(x)
    if layers := _all_factors([x for _, x in some]):
        pairs = [factors(layer) for layer in layers]
        A = torch.cat([A for A, _ in pairs])
        return capped(LowRank(A, torch.cat([c * B for (c, _), (_, B) in zip(some, pairs, strict=True)], dim=1)))
    total = some[0][0] * dense(some[0][1])
    for c, x in some[1:]:
        total = total + c * dense(x)
    return total


def compose(u: Tensor, s: Tensor, vh: Tensor, like: Weight) -> Weight:
    """Return ``U diag(s) Vh``: factors A = Vh, B = U diag(s) where ``like`` is factors, else the dense product."""
    return LowRank(vh, u * s) if isinstance(like, LowRank) else (u * s) @ vh


def dense(weight: Weight) -> Tensor:
    """Return the whole tensor, in fp32 at least."""
    return weight.dense() if isinstance(weight, LowRank) else at_least_fp32(weight)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in fp32, or as it is if wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_norm(weight: Weight) -> float:
    """Return the squared Frobenius norm, summed in fp64; of factors from the R of both QR decompositions."""
    if isinstance(weight, Tensor):
        return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    A, B = factors(weight)
    core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T
    return float(core.square().sum())


def _all_factors(weights: Sequence[Weight]) -> list[LowRank]:
    """Return the weights if all are factors, else nothing."""
    layers = [x for x in weights if isinstance(x, LowRank)]
    return layers if len(layers) == len(weights) else []
