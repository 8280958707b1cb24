"""The one small type that everybody shares: a layer's low-rank update, with its shape checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nscmerge.errors import ShapeError

#: Singular values up to this fraction of the largest count as zero (spec: rank rule of the null-space ratio).
RANK_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class LowRank:
    """One layer of one adapter: the update ``scaling * B @ A`` of a frozen weight.

    Args:
        A: Down-projection, (r, d_in).
        B: Up-projection, (d_out, r).
        scaling: s = alpha / r (alpha / sqrt(r) for rsLoRA), no unit; applied once, by whoever forms the product.

    Raises:
        ShapeError: A or B is not a matrix, or their ranks differ.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ShapeError(
                f"A is {tuple(self.A.shape)} and B is {tuple(self.B.shape)}; "
                "expected A (r, d_in) and B (d_out, r) with the same rank r."
            )

    @property
    def rank(self) -> int:
        """Number of rows of A, which may exceed the numerical rank of the product."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Input width of the layer."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Output width of the layer."""
        return self.B.shape[0]

    def dense(self) -> Tensor:
        """Return ``scaling * B @ A`` (d_out, d_in), in fp32 at least whatever the stored dtype."""
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32)
        return (self.scaling * self.B.to(dtype)) @ self.A.to(dtype)

    def orthonormal(self) -> LowRank:
        """Return the same product with orthonormal rows of A, scaling 1, in fp64.

        Rows in the numerical null space of A are dropped, so the rank may shrink, to 0 for a zero A. Thin SVD of A:
        with A = U S V^T the pair is (V^T, s B U S).
        """
        u, s, vh = torch.linalg.svd(self.A.double(), full_matrices=False)
        keep = s > RANK_TOLERANCE * s.max() if s.numel() else s > 0
        B = self.scaling * (self.B.double() @ (u[:, keep] * s[keep]))
        return LowRank(vh[keep], B)


def check_same_layer(experts: Sequence[LowRank], layer: str = "", names: Sequence[str] = ()) -> None:
    """Raise unless all experts share (d_out, d_in); their ranks may differ.

    Args:
        experts: One layer of T adapters.
        layer: Its dotted name, for the message.
        names: T adapter names, for the message.

    Raises:
        ShapeError: Some expert's (d_out, d_in) differs from the first one's.
    """
    if not experts:
        raise ShapeError(f"layer '{layer}': no adapter has it; at least one is needed.")
    first = (experts[0].d_out, experts[0].d_in)
    for i, expert in enumerate(experts[1:], start=1):
        if (got := (expert.d_out, expert.d_in)) != first:
            named = [f" of '{names[j]}'" if names else f" of expert {j}" for j in (0, i)]
            where = f"layer '{layer}': " if layer else ""
            raise ShapeError(
                f"{where}the update{named[0]} is {first}, {got}{named[1]} (d_out, d_in); "
                "one merge needs adapters of the same base model."
            )
