"""Iso-C: all singular values of the sum become their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nscmerge.continual.algebra import combine, compose, thin_svd
from nscmerge.continual.state import Weight
from nscmerge.continual.two_slot import TwoSlot


@dataclass(frozen=True, kw_only=True)
class IsoC(TwoSlot):
    """M_t = lam mean(S) U V^T with M_{t-1} + delta_t = U diag(S) V^T, over the singular values that exist.

    Args:
        lam: Factor of the result, no unit (the paper's scale).

    Source: Marczak et al., arXiv:2502.04959; specification, section 3.5. The public dense code takes the mean over
    min(d_out, d_in) values and fills up with arbitrary vectors; at full rank both agree.
    """

    NAME: ClassVar[str] = "iso_c"

    lam: float = 1.0

    @property
    def first(self) -> float:
        """The factor of the first expert."""
        return self.lam

    def pair(self, old: Weight, new: Weight) -> tuple[Weight, Mapping[str, Any]]:
        """Return the flattened sum."""
        total = combine((1.0, old), (1.0, new))
        u, s, vh = thin_svd(total)
        if not len(s):
            return combine((0.0, total)), {"rank": 0}
        return compose(u, self.lam * s.mean().expand(len(s)), vh, total), {"rank": len(s)}
