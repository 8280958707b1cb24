"""WUDI: the merged matrix disturbs each slot least on the slot's own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nscmerge.continual.adam import Adam
from nscmerge.continual.algebra import combine, dense, squared_norm, thin_svd
from nscmerge.continual.state import State, Weight
from nscmerge.continual.two_slot import TwoSlot
from nscmerge.factors import LowRank
from nscmerge.methods.options import check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Wudi(TwoSlot):
    """M_t minimises sum_i norm((X - tau_i) tau_i^T)^2 / norm(tau_i)^2, tau = (M_{t-1}, delta_t), by Adam from the sum.

    Adam scales every entry by itself, so X leaves the factors at the first step: layers are dense from t = 2, unless
    ``rank`` cuts them afterwards. A slot that is zero is dropped (the public code has 0 / 0 there).

    Args:
        lr: Step size of Adam; at 1e-5 an entry moves by 5e-4 at most in 50 steps.
        steps: Number of Adam steps.
        rank: Cut every adapted layer to this rank after the solve; None keeps it dense.

    Source: Cheng et al., arXiv:2503.08099; specification, section 3.7.
    """

    NAME: ClassVar[str] = "wudi"

    lr: float = 1e-5
    steps: int = 50
    rank: int | None = None

    def check(self) -> None:
        """Raise where an option is out of range."""
        check_number(self.NAME, "lr", self.lr, "(0, inf)")
        check_whole(self.NAME, "steps", self.steps, at_least=0)
        if self.rank is not None:
            check_whole(self.NAME, "rank", self.rank, at_least=1)

    def pair(self, old: Weight, new: Weight) -> tuple[Weight, Mapping[str, Any]]:
        """Return the minimiser after ``steps`` steps."""
        slots = [(tau, norm) for tau in (old, new) if (norm := squared_norm(tau))]
        if len(slots) < 2:
            # One slot is its own minimiser.
            return combine((1.0, old), (1.0, new)), {}
        x, before, after = solve([tau for tau, _ in slots], [norm for _, norm in slots], self.lr, self.steps)
        log = {"loss_before": before, "loss_after": after}
        if self.rank is None or not isinstance(new, LowRank):
            return x, log
        u, s, vh = (part.double() for part in thin_svd(x))
        return LowRank(vh[: self.rank], (u * s)[:, : self.rank]), log

    def notes(self, state: State) -> list[str]:
        """Return that layers became dense."""
        if not any(isinstance(state.weight(name), Tensor) for name in state.layers):
            return []
        return ["WUDI's Adam steps leave the factor space, so layers are dense from the second expert on."]


def solve(slots: list[Weight], norms: list[float], lr: float, steps: int) -> tuple[Tensor, float, float]:
    """Return X after some Adam steps from the sum of slots, and the objective before and after.

    The gradient is 2 (X C - D) with C = sum_i tau_i^T tau_i / w_i and D = sum_i tau_i tau_i^T tau_i / w_i. With rows P
    such that C = P^T P it is 2 (X P^T - sum_i tau_i P_i^T) P: O(d_out d_in rows) a step, no d_in x d_in matrix while
    the rows are few.

    Args:
        slots: Matrices tau_i, (d_out, d_in), not zero.
        norms: w_i, their squared Frobenius norms.
        lr: Step size.
        steps: Number of steps.
    """
    x = dense(combine(*((1.0, tau) for tau in slots)))
    x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    rows = [(_rows(tau) / norm**0.5).to(x.dtype) for tau, norm in zip(slots, norms, strict=True)]
    p = torch.cat(rows)
    d = sum((dense(tau).to(x.dtype) @ r.T @ r for tau, r in zip(slots, rows, strict=True)), torch.zeros_like(x))
    c = p.T @ p if 2 * len(p) > p.shape[1] else None
    optimizer = Adam(x, lr)

    def objective() -> float:
        parts = ((x - dense(tau).to(x.dtype)) @ r.T for tau, r in zip(slots, rows, strict=True))
        return sum(float(part.square().sum()) for part in parts)

    before = objective()
    for _ in range(steps):
        product = x @ c if c is not None else (x @ p.T) @ p
        optimizer.step(2 * (product - d))
    return x, before, objective()


def _rows(tau: Weight) -> Tensor:
    """Return rows P with P^T P = tau^T tau: of factors diag(s) Vh (rank, d_in), else the matrix itself."""
    if isinstance(tau, Tensor):
        return tau
    _, s, vh = thin_svd(tau)
    return s[:, None] * vh
