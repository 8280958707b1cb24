"""Truncated SVD of the summed updates, in factor space."""

from __future__ import annotations

from collections.abc import Sequence

from nscmerge.errors import MethodError
from nscmerge.factors import LowRank, check_same_layer
from nscmerge.methods.options import check_number
from nscmerge.methods.stacking import weighted_sum, working_dtype
from nscmerge.spectra import product_svd, rank_for_energy


def svd(
    experts: Sequence[LowRank], *, lam: float = 1.0, rank: int | None = None, energy: float | None = None
) -> LowRank:
    """Return ``lam`` times the best low-rank approximation of ``sum_k s_k B_k A_k`` of one layer.

    B = U_r diag(sigma_r), A = V_r^T, from an fp64 SVD of an R x R core. Capped at the numerical rank of the sum, beyond
    which singular vectors are noise. Half-precision factors give fp32 ones.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k.
        lam: Merge coefficient, no unit; it goes into B.
        rank: Rank to keep, >= 1. Without ``rank`` and ``energy`` the largest rank among the experts.
        energy: Share of the squared singular values' sum to keep, in (0, 1]: the smallest rank that reaches it. With
            ``rank`` too, the smaller of both.

    Raises:
        ShapeError: The experts differ in d_in or d_out. Their ranks may differ.
        MethodError: ``rank`` is not a whole number >= 1, or ``energy`` is outside (0, 1].

    Source: Tang et al., LoRA Merging with SVD, ICML 2025 workshop (PEFT's "svd" without clamp).
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise MethodError(f"svd: rank is {rank!r}; expected a whole number >= 1, or None for the largest rank.")
    if energy is not None:
        check_number("svd", "energy", energy, "(0, 1]")
    check_same_layer(experts)
    dtype = working_dtype(experts)
    wide = [LowRank(e.A.double(), e.B.double(), e.scaling) for e in experts]
    u, s, vh = product_svd(weighted_sum(wide, 1.0))
    keep = len(s) if energy is None else rank_for_energy(s, energy)
    if rank is not None or energy is None:
        keep = min(keep, rank if rank is not None else max(e.rank for e in experts))
    return LowRank(vh[:keep].to(dtype), (lam * u[:, :keep] * s[:keep]).to(dtype))


def svd_untruncated(experts: Sequence[LowRank], *, lam: float = 1.0) -> LowRank:
    """Return ``lam * sum_k s_k B_k A_k`` of one layer without any truncation, as the NSC authors' code does.

    Their function of this name never cuts the rank, so its row is task arithmetic at another lambda.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k.
        lam: Merge coefficient, no unit.

    Raises:
        ShapeError: The experts differ in d_in or d_out. Their ranks may differ.

    Source: released code of NSC (arXiv:2603.26317), merging type "sum".
    """
    return weighted_sum(experts, lam)
