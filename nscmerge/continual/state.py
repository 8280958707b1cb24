"""What continual merging keeps between two experts: everything that the next step needs of the past, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nscmerge.factors import LowRank
from nscmerge.peft_format import Kind

#: One matrix or tensor of an update: factors, or whole.
Weight = LowRank | Tensor


@dataclass(frozen=True)
class Absorbed:
    """One expert that went in.

    Args:
        name: The task.
        source: Folder or hub id that it came from, None if it was made in memory.
        sha256: Hash of its weights, None if it was made in memory.
        log: By layer or tensor name, what the step did there (losses before and after, ranks); JSON-able.
        skipped: By name, what of the expert was left out, with the reason.
    """

    name: str
    source: str | None = None
    sha256: str | None = None
    log: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class State:
    """The merge of t experts. A step is a pure function (state, expert) -> state.

    Args:
        method: Name of the method.
        variant: ``default``, ``papercode``, or a method's own.
        options: All options with their defaults filled in, JSON-able; ``make(method, variant, **options)`` takes them.
        t: How many experts are in.
        merged: M_t, lambda included, by layer name (of adapters) or tensor name (of full checkpoints). Names that are
            missing here are zero: the method leaves the base model alone there. Factors may carry a scaling; they are
            fp64, or an expert's own while nothing but a scale was done to them. May be lazy.
        shapes: Shape of everything that any expert had, (d_out, d_in) for layers, by name, sorted.
        layers: Names in ``shapes`` that are layers of adapters; the others are tensor names.
        kinds: Layers that are embeddings or convolutions.
        scalars: Numbers that a method keeps (OPCM: ``lam``, ``norm_sum``).
        tensors: Tensors that a method keeps beside ``merged`` (MagMax: ``s``).
        absorbed: The experts in order.
        base_model: Hub id or path of the base model, None if unknown.
        linear: For full checkpoints: names of the modules that are ``nn.Linear``.
    """

    method: str
    variant: str
    options: Mapping[str, Any]
    t: int = 0
    merged: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: Sequence[str] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    absorbed: Sequence[Absorbed] = ()
    base_model: str | None = None
    linear: Sequence[str] = ()

    def weight(self, name: str) -> Weight:
        """Return M_t of one name in ``shapes``; zero (factors of rank 0, or a tensor) where the method has nothing."""
        return self.merged[name] if name in self.merged else zero(self.shapes[name], name in self.layers)


def zero(shape: tuple[int, ...], layer: bool) -> Weight:
    """Return a zero update: factors of rank 0 for a layer of an adapter, else an fp32 tensor."""
    if not layer:
        return torch.zeros(shape)
    d_out, d_in = shape
    return LowRank(torch.zeros(0, d_in), torch.zeros(d_out, 0))
