"""One task's weights as its own mask on weights that all tasks share: stored as a small adapter and a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.lazy import Lazy
from nscmerge.naming import unknown


@dataclass(frozen=True, eq=False)
class MaskedWeights(Mapping[str, Tensor]):
    """``{name: rescaler * where(sign(delta) == sign(shared), shared, 0)}``, each tensor computed when asked for.

    The mask keeps the entries where the task's own update agrees in sign with the shared one. It is never stored: the
    task's factors give it back, bit for bit where the product is formed by the same kernel.

    Args:
        shared: The weights of all tasks by layer or tensor name, lambda included: fp32, or any dtype that keeps signs.
        layers: The task's own factors by layer, lambda not included.
        whole: The task's own deltas of whole tensors. A name in neither is a zero update, and its mask keeps nothing.
        rescaler: Finite factor on what the mask keeps, no unit.
        flipped: ``shared`` was multiplied by a negative lambda, so that agreement is an opposite sign.

    Raises:
        AdapterError: The task has a layer or tensor that ``shared`` has not.
    """

    shared: Mapping[str, Tensor]
    layers: Mapping[str, LowRank]
    whole: Mapping[str, Tensor]
    rescaler: float
    flipped: bool = False

    def __post_init__(self) -> None:
        for name in [*self.layers, *self.whole]:
            if name not in self.shared:
                raise AdapterError(f"a mask on shared weights: {unknown('shared layer or tensor', name, self.shared)}")

    def __getitem__(self, name: str) -> Tensor:
        shared = self.shared[name].to(torch.float32)
        if name in self.layers:
            delta = self.layers[name].dense().to(torch.float32)
        elif name in self.whole:
            delta = self.whole[name].to(torch.float32)
        else:
            return torch.zeros_like(shared)
        return self.rescaler * agreeing(-delta if self.flipped else delta, shared)

    def __contains__(self, name: object) -> bool:
        return name in self.shared

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)

    def scaled(self, factor: float) -> MaskedWeights:
        """Return the same weights times ``factor``; a negative one turns the sign that counts as agreement."""
        shared = self.shared
        return replace(
            self,
            shared=Lazy(list(shared), lambda name: factor * shared[name]),
            flipped=self.flipped != (factor < 0),
        )


def agreeing(delta: Tensor, shared: Tensor) -> Tensor:
    """Return ``shared`` where ``delta`` has the same sign, else 0; an exact zero agrees with nothing.

    Signs are compared, not the product with zero, which underflows for small updates. Same shape and dtype.
    """
    return torch.where(torch.sign(delta) == torch.sign(shared), shared, 0)
