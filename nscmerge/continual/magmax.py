"""MagMax: of every entry the update that is largest so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nscmerge.continual.algebra import dense
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import ContinualMethod, Merged
from nscmerge.continual.state import State
from nscmerge.lazy import Lazy


@dataclass(frozen=True, kw_only=True)
class MagMax(ContinualMethod):
    """s_t = delta_t where abs(delta_t) >= abs(s_{t-1}), else s_{t-1}; M_t = lam s_t, on every tensor. Dense.

    s is kept, not M / lam, which rounds and is lost at lam = 0. The text of the NUFILT paper adds lam s_t to the merge
    so far; its code does not, and only so the order of experts does not matter, as its tables show.

    Args:
        lam: Merge coefficient, no unit.

    Source: Marczak et al., arXiv:2407.06322; specification, section 3.4.
    """

    NAME: ClassVar[str] = "magmax"

    lam: float = 0.5

    def merge(self, step: Step) -> Merged:
        """Return s_t, and M_t as it is asked for."""
        largest: dict[str, Tensor] = {}
        for name in step.watch(step.names, f"{self.NAME}, step {step.t}"):
            new = dense(step.new(name))
            old = step.state.tensors.get(name, torch.zeros_like(new))
            largest[name] = torch.where(new.abs() >= old.abs(), new, old)
        return Merged(Lazy(step.names, lambda name: self.lam * largest[name]), tensors=largest)

    def notes(self, state: State) -> list[str]:
        """Return that layers are dense."""
        return ["MagMax picks entry by entry, so every layer is dense."] if state.layers else []
