"""Running mean of all updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nscmerge.continual.algebra import combine
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import Layerwise
from nscmerge.continual.state import Weight


@dataclass(frozen=True, kw_only=True)
class WeightAverage(Layerwise):
    """M_t = ((t - 1) M_{t-1} + delta_t) / t on every tensor. The order of experts does not matter.

    Source: weight averaging (Wortsman et al., arXiv:2203.05482) as a running mean; specification, section 3.1.
    """

    NAME: ClassVar[str] = "weight_average"

    def layer(self, step: Step, name: str) -> tuple[Weight | None, Mapping[str, Any]]:
        """Return the mean of one name."""
        return combine(((step.t - 1) / step.t, step.old(name)), (1 / step.t, step.new(name))), {}
