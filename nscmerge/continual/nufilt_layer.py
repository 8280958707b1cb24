"""One layer of one NUFILT step: its singular vectors, the reduced problem, and the merge with the fitted adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nscmerge.continual.algebra import at_least_fp32, capped, dense, thin_svd
from nscmerge.continual.nufilt_solve import Problem
from nscmerge.continual.right_vectors import SvdKind, right_vectors
from nscmerge.continual.state import Weight
from nscmerge.factors import LowRank

#: Residuals up to this many times eps (dtype) of delta's own size are rounding.
_NO_RESIDUAL = 1000


@dataclass(frozen=True, eq=False)
class Layer:
    """M_{t-1} and delta_t of one layer, ready to be solved and fused.

    Args:
        problem: The reduced problem.
        old: M, for factors at its rank.
        new: delta.
        U: Orthonormal columns with delta = U K, (d_out, rho); None stands for the identity.
        filtered: Whether delta is filtered, or added whole (ablation).
    """

    problem: Problem
    old: Weight
    new: Weight
    U: Tensor | None
    filtered: bool

    @property
    def nothing_to_fit(self) -> bool:
        """True where the residual is zero but for rounding (as for an expert that is in already)."""
        K, target = self.problem.K, self.problem.target
        size = torch.linalg.vector_norm(K)
        return bool(torch.linalg.vector_norm(target) <= _NO_RESIDUAL * torch.finfo(K.dtype).eps * size)

    def fused(self, adapter: Tensor | None) -> Weight:
        """Return M + delta P + U adapter.

        Args:
            adapter: U^T times the adapter's update, (rho, d_in); None for none.
        """
        K, Vp = self.problem.K, self.problem.Vp
        if isinstance(self.old, LowRank) and self.U is not None and isinstance(self.new, LowRank):
            rows = K - (K @ Vp) @ Vp.T if self.filtered else K
            rows = rows if adapter is None else rows + adapter
            return capped(LowRank(torch.cat([self.old.A, rows]), torch.cat([self.old.B, self.U], dim=1)))
        total = dense(self.old) + dense(self.new)
        if self.filtered:
            total -= (dense(self.new) @ Vp) @ Vp.T
        if adapter is not None:
            total += adapter if self.U is None else self.U @ adapter
        return total


def prepare(
    old: Weight,
    new: Weight,
    *,
    filter_rank: int,
    task_rank: int,
    filtered: bool = True,
    svd: SvdKind = "exact",
    seed: int = 0,
    by_rank: bool = True,
) -> Layer | None:
    """Return one layer ready to be solved, or None where M or delta is zero, so that M + delta is all there is to do.

    Factors: thin SVDs in fp64, K = diag(S) V^T. Dense: K is the triangular factor of delta where d_out > d_in, else
    delta itself.

    Args:
        old: M_{t-1}.
        new: delta_t.
        filter_rank: r_p; p = min(r_p, rank M).
        task_rank: r_v; q = min(r_v, rank delta).
        filtered: False for the ablation "without filter".
        svd: Exact or randomised, for dense matrices.
        seed: Of the randomised one.
        by_rank: False (``papercode``) takes vectors beyond the rank too.

    Source: NUFILT, Eqs. 5-12 as the specification, section 2.1, repairs them.
    """
    U: Tensor | None = None
    if isinstance(old, LowRank) and isinstance(new, LowRank):
        u_old, s_old, vh_old = thin_svd(old)
        U, s, vh = thin_svd(new)
        if not len(s_old) or not len(s):
            return None
        old, K = LowRank(vh_old, u_old * s_old), s[:, None] * vh
        Vp, Vv = vh_old[:filter_rank].T, vh[:task_rank].T
        M_Vv = old.B @ (old.A @ Vv)
    else:
        M, K = dense(old), at_least_fp32(dense(new))
        if not bool(M.any()) or not bool(K.any()):
            return None
        Vp = right_vectors(M, filter_rank, svd=svd, seed=seed, by_rank=by_rank)
        Vv = right_vectors(K, task_rank, svd=svd, seed=seed, by_rank=by_rank)
        M_Vv = M @ Vv
        if K.shape[0] > K.shape[1]:
            U, K = torch.linalg.qr(K)
    reached = M_Vv if U is None else U.T @ M_Vv
    K_Vp = K @ Vp
    if filtered:
        target = torch.cat([torch.zeros_like(K_Vp), K_Vp @ (Vp.T @ Vv) - reached], dim=1)
    else:
        target = torch.cat([-K_Vp, -reached], dim=1)
    outside = 0.0 if U is None else max(0.0, float(M_Vv.square().sum() - reached.square().sum()))
    return Layer(Problem(K, Vp, Vv, target, outside), old, new, U, filtered)
