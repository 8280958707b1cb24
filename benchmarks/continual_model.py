"""The random model and experts of ``continual.py``: layers of a ViT of some width and depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nscmerge import Adapter, LowRank
from nscmerge.draws import generator

Kind = Literal["lora", "full"]


@dataclass(frozen=True)
class Sizes:
    """One model: layers of a ViT of some width and depth, and the experts' rank."""

    dim: int
    blocks: int
    rank: int
    kind: Kind
    quick: bool

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by name: q, k, v, out, fc1, fc2 of every block."""
        if self.quick:
            return {"blocks.0.attn.q": (self.dim, self.dim)}
        d = self.dim
        return {
            f"blocks.{i}.{name}": shape
            for i in range(self.blocks)
            for name, shape in {
                **{f"attn.{part}": (d, d) for part in ("q", "k", "v", "out")},
                "mlp.fc1": (4 * d, d),
                "mlp.fc2": (d, 4 * d),
            }.items()
        }

    def expert(self, number: int) -> Adapter:
        """Return a random expert; half of its input directions are those of all experts. Largest singular value ~ 1."""
        layers: dict[str, LowRank] = {}
        whole: dict[str, Tensor] = {}
        for name, (d_out, d_in) in self.layers.items():
            own, shared = generator(number, name), generator(-1, name)
            rank = self.rank if self.kind == "lora" else min(d_out, d_in)
            A = torch.randn(rank, d_in, generator=own)
            A[: rank // 2] = torch.randn(rank // 2, d_in, generator=shared)
            B = torch.randn(d_out, rank, generator=own)
            if self.kind == "full":
                # sigma_k ~ k^-0.5, as task vectors have it.
                B *= torch.arange(1, rank + 1) ** -0.5
            factors = LowRank(A / d_in**0.5, B / d_out**0.5)
            if self.kind == "lora":
                layers[name] = factors
            else:
                whole[f"{name}.weight"] = factors.dense()
        return Adapter(layers, "base", whole, name=f"task{number}", linear=list(self.layers) if whole else ())

    def names(self) -> list[str]:
        """Names as the merge has them."""
        return [name if self.kind == "lora" else f"{name}.weight" for name in self.layers]

    def deltas(self, number: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return an expert's dense deltas by the names of the merge; multiplied out in ``dtype``."""
        expert = self.expert(number)
        return {name: dense({**expert.layers, **expert.dense}[name], dtype) for name in self.names()}


def dense(weight: LowRank | Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as a dense matrix; factors are multiplied out in ``dtype``."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return LowRank(weight.A.to(dtype), weight.B.to(dtype), weight.scaling).dense()
