"""OPCM: what is new is projected away from what is there, and the norm is kept level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nscmerge.continual.algebra import capped, combine, dense, factors, squared_norm, thin_svd
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import ContinualMethod, Merged
from nscmerge.continual.state import Weight
from nscmerge.factors import LowRank
from nscmerge.methods.options import check_number


@dataclass(frozen=True, kw_only=True)
class Opcm(ContinualMethod):
    """M_t = (lam_{t-1} M_{t-1} + P(delta_t)) / lam_t, with lam_t such that norm(M_t) is the experts' mean norm.

    P projects the weights of linear layers; everything else is added as it is. Norms run over the whole model.
    ``papercode`` leaves the diagonal of the projection in place, as the first release does by accident.

    Args:
        alpha: Share of the sum of singular values of M_{t-1} that counts as taken, in [0, 1].

    Source: Tang et al., arXiv:2501.09522; specification, section 3.9.
    """

    NAME: ClassVar[str] = "opcm"

    alpha: float = 0.5

    def check(self) -> None:
        """Raise where an option is out of range."""
        check_number(self.NAME, "alpha", self.alpha, "[0, 1]")

    def merge(self, step: Step) -> Merged:
        """Return M_t, lam_t and the sum of the experts' norms."""
        step.check_linear(self.NAME)
        norm_sum = step.state.scalars.get("norm_sum", 0.0) + _norm({name: step.new(name) for name in step.names})
        if step.t == 1:
            first = {name: combine((1.0, step.new(name))) for name in step.names}
            return Merged(first, {"lam": 1.0, "norm_sum": norm_sum})
        before = step.state.scalars["lam"]
        sums: dict[str, Weight] = {}
        log: dict[str, Mapping[str, Any]] = {}
        for name in step.watch(step.names, f"{self.NAME}, step {step.t}"):
            old, new = step.old(name), step.new(name)
            if step.is_linear(name):
                sums[name], log[name] = add_projected(before, old, new, self.alpha, self.variant != "papercode")
            else:
                sums[name] = combine((before, old), (1.0, new))
        # Nothing but zeros so far has no norm to keep.
        lam = norm * step.t / norm_sum if (norm := _norm(sums)) else before
        level = {name: combine((1 / lam, x)) for name, x in sums.items()}
        return Merged(level, {"lam": lam, "norm_sum": norm_sum}, log=log)


def add_projected(
    lam: float, old: Weight, new: Weight, alpha: float, without_diagonal: bool
) -> tuple[Weight, dict[str, Any]]:
    """Return ``lam M + delta - U K V^T`` of one matrix, and the ranks that it took.

    M = U diag(S) V^T at its rank rho; r leading singular values hold at most the share alpha of their sum. K (rho, rho)
    equals U^T delta V on its leading r x r block and on its diagonal, and is zero elsewhere, so that the full bases of
    the paper are not needed.

    Args:
        lam: lam_{t-1}.
        old: M_{t-1}.
        new: delta_t.
        alpha: Share, in [0, 1].
        without_diagonal: Whether the diagonal outside the block is taken out too.
    """
    u, s, vh = thin_svd(old)
    log = {"rank_merged": len(s), "split": 0}
    if not len(s):
        return combine((lam, old), (1.0, new)), log
    pair = factors(new) if isinstance(new, LowRank) else None
    c = (u.T @ pair[1]) @ (pair[0] @ vh.T) if pair else u.T @ dense(new) @ vh.T
    split = int((s.cumsum(0) / s.sum() <= alpha).sum())
    k = torch.diag(c.diagonal()) if without_diagonal else torch.zeros_like(c)
    k[:split, :split] = c[:split, :split]
    log["split"] = split
    if pair and isinstance(old, LowRank):
        A, B = pair
        return capped(LowRank(torch.cat([vh, A]), torch.cat([u @ (lam * torch.diag(s) - k), B], dim=1))), log
    return combine((lam, old), (1.0, new), (-1.0, u @ k @ vh)), log


def _norm(weights: Mapping[str, Weight]) -> float:
    """Return the norm over the whole model, names in the given order."""
    return math.sqrt(sum(squared_norm(x) for x in weights.values()))
