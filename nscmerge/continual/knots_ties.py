"""KnOTS-TIES on the pair (merge so far, new expert), layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nscmerge.continual.algebra import capped, combine, dense, factors, thin_svd
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import Layerwise
from nscmerge.continual.state import Weight
from nscmerge.factors import RANK_TOLERANCE, LowRank
from nscmerge.methods.options import check_choice, check_number
from nscmerge.methods.ties_steps import AGGS, Agg, Tally, disjoint_merge, elect_by_values, kept_rank

#: Singular values up to here are cut, whatever the scale: so the code behind the tables has it.
CUT = 1e-4


@dataclass(frozen=True, kw_only=True)
class KnotsTies(Layerwise):
    """M_1 = lam delta_1; then M_t = M_{t-1} + lam U diag(S) Z, Z the TIES merge of V_a^T and V_b^T of this layer.

    [M_{t-1}, delta_t] = U diag(S) [V_a^T, V_b^T] in fp64, singular values above 1e-4. Trimmed are the entries of V^T,
    not of diag(S) V^T, at one threshold per layer and slot. Only weights of linear layers; the rest stays at the base.
    The rank never exceeds the sum of the experts' ranks: U lies in the span of the factors that are there.

    Args:
        lam: Merge coefficient, no unit; the paper has 0.3 for 8 tasks, 0.1 for 14 and 20.
        density: Share of entries that each slot keeps, in (0, 1].
        agg: ``sum`` of the entries that agree, or their ``mean``.

    Source: Stoica et al., arXiv:2410.19735, as the code behind the NUFILT tables has it; specification, section 3.8.
    KnOTS' own rule is :func:`nscmerge.methods.knots_ties.knots_ties`.
    """

    NAME: ClassVar[str] = "knots_ties"

    lam: float = 0.3
    density: float = 0.2
    agg: Agg = "sum"

    def check(self) -> None:
        """Raise where an option is out of range."""
        super().check()
        check_number(self.NAME, "density", self.density, "(0, 1]")
        check_choice(self.NAME, "agg", self.agg, AGGS)

    def layer(self, step: Step, name: str) -> tuple[Weight | None, Mapping[str, Any]]:
        """Return M_t of one layer, None where it is no linear layer."""
        step.check_linear(self.NAME)
        old, new = step.old(name), step.new(name)
        if not step.is_linear(name):
            return None, {}
        if step.t == 1:
            return combine((self.lam, new)), {}
        if isinstance(old, LowRank) and isinstance(new, LowRank):
            # In orthonormal coordinates of what both write into: of M at its rank, so that it cannot grow by itself.
            u, s, vh = thin_svd(old)
            A, B = factors(new)
            q, r = torch.linalg.qr(torch.cat([u * s, B], dim=1))
            a, b = r[:, : len(s)] @ vh, r[:, len(s) :] @ A
            added, log = self.aligned(a, b)
            return capped(LowRank(a + added, q)), log
        added, log = self.aligned(dense(old).double(), dense(new).double())
        return dense(old) + added.to(dense(old).dtype), log

    def aligned(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return ``lam U diag(S) Z`` of two matrices (n, d_in) in fp64, and what was cut."""
        u, s, vh = torch.linalg.svd(torch.cat([a, b], dim=1), full_matrices=False)
        keep = s > CUT
        lost = s[~keep & (s > RANK_TOLERANCE * s.max())] if len(s) else s
        log: dict[str, Any] = {"kept": int(keep.sum()), "cut": len(lost)}
        if len(lost):
            log["largest_cut"] = float(lost[0])
        if not bool(keep.any()):
            return torch.zeros_like(a), log
        va, vb = vh[keep][:, : a.shape[1]], vh[keep][:, a.shape[1] :]
        return self.lam * (u[:, keep] * s[keep]) @ ties_pair(va, vb, self.density, self.agg), log


def ties_pair(a: Tensor, b: Tensor, density: float, agg: Agg) -> Tensor:
    """Return the TIES merge of two tensors of one shape, each trimmed by itself to int(density n) + 1 entries."""
    tally = Tally.of([_trimmed(a, density), _trimmed(b, density)])
    return disjoint_merge(tally, elect_by_values(tally, lambda: int(tally.total.sign().sum())), agg)


def _trimmed(v: Tensor, density: float) -> Tensor:
    if not (rank := kept_rank(v.numel(), density)):
        return v
    magnitudes = v.abs()
    return torch.where(magnitudes >= magnitudes.flatten().kthvalue(rank).values, v, 0.0)
