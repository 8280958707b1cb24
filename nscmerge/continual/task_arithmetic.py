"""Task arithmetic, one expert after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nscmerge.continual.algebra import combine
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import Layerwise
from nscmerge.continual.state import Weight


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Layerwise):
    """M_t = M_{t-1} + lam delta_t on every tensor, also at t = 1. The order of experts does not matter.

    ``papercode``: M_t = lam delta_t, restarted from the base model at every step, as the code behind the Flan-T5 table.

    Args:
        lam: Merge coefficient, no unit; the paper has 0.3 for 8 tasks, 0.1 for 14 and 20.

    Source: Ilharco et al., arXiv:2212.04089; specification, section 3.2.
    """

    NAME: ClassVar[str] = "task_arithmetic"

    lam: float = 0.3

    def layer(self, step: Step, name: str) -> tuple[Weight | None, Mapping[str, Any]]:
        """Return the sum of one name."""
        kept = 0.0 if self.variant == "papercode" else 1.0
        return combine((kept, step.old(name)), (self.lam, step.new(name))), {}
