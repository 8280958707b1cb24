"""Methods that merge the pair (merge so far, new expert) as if it were two tasks, matrix by matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nscmerge.continual.algebra import combine
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import Layerwise
from nscmerge.continual.state import Weight


@dataclass(frozen=True, kw_only=True)
class TwoSlot(Layerwise):
    """M_{t-1} counts as one task, whatever it contains. Everything 2-D is a matrix, embeddings too.

    M_1 = c delta_1. Other tensors become (M_{t-1} + delta_t) / 2 from t = 2, so older tasks fade as 1 / 2^k.

    Source: continual merging specification, section 1 (table) and 3.
    """

    @property
    def first(self) -> float:
        """The factor c of the first expert."""
        return 1.0

    def layer(self, step: Step, name: str) -> tuple[Weight | None, Mapping[str, Any]]:
        """Return the merged pair of one name."""
        old, new = step.old(name), step.new(name)
        if not step.is_matrix(name):
            return combine((1.0, new)) if step.t == 1 else combine((0.5, old), (0.5, new)), {}
        if step.t == 1:
            return combine((self.first, new)), {}
        return self.pair(old, new)

    @abstractmethod
    def pair(self, old: Weight, new: Weight) -> tuple[Weight, Mapping[str, Any]]:
        """Return M_t of one matrix from M_{t-1} and delta_t, and what to log."""
