"""All adapters of one merge, turned round: by layer, then by task. What every closed-form method starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.progress import Watch, quiet


@dataclass(frozen=True, eq=False)
class Stack:
    """K adapters by layer: names sorted, tasks in the given order, zeros where a task lacks a layer.

    Args:
        tasks: Names of the K tasks.
        layers: ``{layer: K factors}``; rank 0 stands for a layer that the task lacks.
        whole: ``{tensor name: K deltas}`` of tensors beside LoRA, in fp32 at least.
        watch: Wraps every loop over layers; shows progress or does nothing.
    """

    tasks: Sequence[str]
    layers: Mapping[str, Sequence[LowRank]]
    whole: Mapping[str, Sequence[Tensor]]
    watch: Watch = quiet

    @classmethod
    def of(cls, experts: Mapping[str, Adapter], watch: Watch = quiet) -> Stack:
        """Return the stack of some adapters, whose shapes :func:`nscmerge.preflight.preflight` has checked."""
        layers = {}
        for name in sorted({name for e in experts.values() for name in e.layers}):
            present = next(e.layers[name] for e in experts.values() if name in e.layers)
            zero = LowRank(present.A[:0], present.B[:, :0])
            layers[name] = [e.layers.get(name, zero) for e in experts.values()]
        whole = {}
        for name in sorted({name for e in experts.values() for name in e.dense}):
            like = next(e.dense[name] for e in experts.values() if name in e.dense)
            dtype = torch.promote_types(like.dtype, torch.float32)
            zeros = torch.zeros_like(like, dtype=dtype)
            whole[name] = [e.dense[name].to(dtype) if name in e.dense else zeros for e in experts.values()]
        return cls(tuple(experts), layers, whole, watch)

    @property
    def names(self) -> list[str]:
        """Every layer and whole tensor, sorted."""
        return sorted([*self.layers, *self.whole])

    def deltas(self, name: str) -> Iterator[Tensor]:
        """Yield every task's dense delta of a layer or whole tensor in fp32, one at a time."""
        for item in self.layers[name] if name in self.layers else self.whole[name]:
            yield (item.dense() if isinstance(item, LowRank) else item).to(torch.float32)

    def check_complete(self, method: str) -> None:
        """Raise unless every task has every layer.

        Raises:
            AdapterError: A task lacks a layer, with its name.
        """
        for layer, experts in self.layers.items():
            if lacking := [task for task, e in zip(self.tasks, experts, strict=True) if e.rank == 0]:
                raise AdapterError(
                    f"layer '{layer}': adapter {', '.join(map(repr, lacking))} lacks it, and method '{method}' works "
                    "on factors, for which a missing layer is no zero. Use a method on updates, such as "
                    "task_arithmetic."
                )
