"""TSV-M: half of each slot's singular triplets, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nscmerge.continual.algebra import combine, compose, rank_of, thin_svd
from nscmerge.continual.state import Weight
from nscmerge.continual.two_slot import TwoSlot


@dataclass(frozen=True, kw_only=True)
class TsvM(TwoSlot):
    """M_t = lam polar([U_1, U_2]) diag(S_1, S_2) polar([V_1, V_2])^T of the top triplets of M_{t-1} and delta_t.

    Of each at most int(min(d_out, d_in) / 2) triplets, and no more than its rank.

    Args:
        lam: Factor of the result, no unit.

    Source: Gargiulo et al., arXiv:2412.00081; specification, section 3.6.
    """

    NAME: ClassVar[str] = "tsv_m"

    lam: float = 1.0

    @property
    def first(self) -> float:
        """The factor of the first expert."""
        return self.lam

    def pair(self, old: Weight, new: Weight) -> tuple[Weight, Mapping[str, Any]]:
        """Return the merged triplets."""
        triplets = [thin_svd(slot) for slot in (old, new)]
        shape = (triplets[0][0].shape[0], triplets[0][2].shape[1])
        most = min(shape) // 2
        dtype = torch.promote_types(triplets[0][1].dtype, triplets[1][1].dtype)
        u = torch.cat([u[:, :most].to(dtype) for u, _, _ in triplets], dim=1)
        s = torch.cat([s[:most].to(dtype) for _, s, _ in triplets])
        v = torch.cat([vh[:most].T.to(dtype) for _, _, vh in triplets], dim=1)
        like = new if isinstance(new, Tensor) or not isinstance(old, Tensor) else old
        log = {"ranks": [min(most, len(s)) for _, s, _ in triplets]}
        if not len(s):
            return combine((0.0, like)), log
        return compose(polar(u), self.lam * s, polar(v).T, like), log


def polar(x: Tensor) -> Tensor:
    """Return P Q^T of the thin SVD x = P D Q^T, (n, k): the closest matrix with orthonormal columns.

    Directions in which x is zero (slots that share a singular vector) stay zero: the polar factor is arbitrary there.
    """
    p, d, qh = torch.linalg.svd(x, full_matrices=False)
    rank = rank_of(d, x.shape[0], x.shape[1], x.dtype)
    closest: Tensor = p[:, :rank] @ qh[:rank]
    return closest
