"""Can this expert go into this merge at all? Asked before anything is computed; and what the step then sees."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.continual.state import State, Weight, zero
from nscmerge.errors import AdapterError, ShapeError
from nscmerge.peft_format import Kind, check_tensor
from nscmerge.progress import Watch, quiet


@dataclass(frozen=True, eq=False)
class Step:
    """One expert on its way into a state, checked: every name that either has, sorted, and both weights of it.

    Args:
        state: M_{t-1} and what belongs to it.
        expert: The new one.
        shapes: Shape by name of all that the state or the expert has, sorted.
        layers: Names of adapted layers among them.
        kinds: Layers that are embeddings or convolutions.
        linear: Modules of full checkpoints that are ``nn.Linear``.
        skipped: By name, what of the expert is left out, with the reason.
        watch: Wraps loops over names.
    """

    state: State
    expert: Adapter
    shapes: Mapping[str, tuple[int, ...]]
    layers: frozenset[str]
    kinds: Mapping[str, Kind]
    linear: Sequence[str]
    skipped: Mapping[str, str]
    watch: Watch = quiet

    @classmethod
    def of(cls, state: State, expert: Adapter, watch: Watch = quiet) -> Step:
        """Return the step that takes ``expert`` into ``state``.

        Raises:
            AdapterError: It is in already, belongs to another base model, has nothing to merge, holds NaN or Inf, or
                has factors where another has a dense delta.
            ShapeError: A shape differs from the one that the state has.
        """
        _check_new(state, expert)
        _check_base(state, expert)
        own = _shapes(expert)
        if not own:
            raise AdapterError(f"adapter '{expert.name}' has neither layers nor dense tensors; nothing to merge.")
        _check_overlap(state, expert, own)
        layers = frozenset({*state.layers, *expert.layers})
        shapes = dict(sorted({**state.shapes, **own}.items()))
        _check_forms(layers, shapes, {*expert.dense, *state.shapes} - {*state.layers})
        linear = sorted({*state.linear, *expert.linear})
        return cls(state, expert, shapes, layers, _kinds(state, expert), linear, _skipped(expert), watch)

    @property
    def t(self) -> int:
        """Number of this step, from 1."""
        return self.state.t + 1

    @cached_property
    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self.shapes)

    def old(self, name: str) -> Weight:
        """Return M_{t-1} of a name; zero where the merge has nothing."""
        if name in self.state.merged:
            return self.state.merged[name]
        if name in self.expert.dense:
            return torch.zeros_like(self.expert.dense[name])
        return zero(self.shapes[name], name in self.layers)

    def new(self, name: str) -> Weight:
        """Return delta_t of a name; zero where the expert has nothing."""
        if name in self.expert.layers:
            return self.expert.layers[name]
        if name in self.expert.dense:
            return self.expert.dense[name]
        if isinstance(old := self.state.merged.get(name), Tensor):
            return torch.zeros_like(old)
        return zero(self.shapes[name], name in self.layers)

    def is_matrix(self, name: str) -> bool:
        """True for adapted layers and for 2-D tensors, embeddings among them."""
        return len(self.shapes[name]) == 2

    def is_linear(self, name: str) -> bool:
        """True for adapted layers, and for tensors that are the weight of an ``nn.Linear``."""
        if name in self.layers:
            return True
        return self.is_matrix(name) and (name in self.linear or module_of(name) in self.linear)

    def check_linear(self, method: str) -> None:
        """Raise where a full checkpoint does not say which of its tensors are weights of linear layers.

        Raises:
            AdapterError: There are matrices, no adapted layer, and an empty ``linear``.
        """
        if not self.layers and not self.linear and (found := [n for n in self.names if self.is_matrix(n)]):
            raise AdapterError(
                f"adapter '{self.expert.name}': method '{method}' treats weights of nn.Linear apart, and nothing says "
                f"which of its {len(found)} matrices are ('{found[0]}', ...). Give Adapter(dense=..., linear=[names "
                "of the nn.Linear modules])."
            )


def module_of(name: str) -> str:
    """Return the module that a tensor name belongs to; a layer's own name as it is."""
    return name.removesuffix(".weight")


def _check_new(state: State, expert: Adapter) -> None:
    for one in state.absorbed:
        if one.name == expert.name:
            raise AdapterError(
                f"task '{expert.name}' is already in this merge (number {state.absorbed.index(one) + 1} of {state.t}, "
                f"{one.source or 'made in memory'}); it would count twice. For another expert give another name.",
                "listed-twice",
            )
        if expert.sha256 is not None and one.sha256 == expert.sha256:
            raise AdapterError(
                f"adapter '{expert.name}' ({expert.source}) has the same weights (SHA-256 {expert.sha256[:12]}...) as "
                f"'{one.name}', which is already in this merge; it would count twice.",
                "listed-twice",
            )


def _check_base(state: State, expert: Adapter) -> None:
    if state.base_model and expert.base_model and state.base_model != expert.base_model:
        raise AdapterError(
            f"'{expert.name}' is an adapter of '{expert.base_model}', this merge is of '{state.base_model}'; one merge "
            "needs one base model. If both are the same weights under two names, give the adapter the merge's name "
            "for it (dataclasses.replace(adapter, base_model=...))."
        )


def _shapes(expert: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that the expert has; raise where something is not finite."""
    own: dict[str, tuple[int, ...]] = {}
    for name, factors in expert.layers.items():
        own[name] = (factors.d_out, factors.d_in)
        for part, tensor in (("A", factors.A), ("B", factors.B)):
            check_tensor(tensor, f"adapter '{expert.name}', layer '{name}': {part}")
    for name in expert.dense:
        check_tensor(tensor := expert.dense[name], f"adapter '{expert.name}': tensor '{name}'")
        own[name] = tuple(tensor.shape)
    return own


def _check_overlap(state: State, expert: Adapter, own: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless names and shapes say that the expert belongs to the same model as the merge so far."""
    inside = ", ".join(f"'{one.name}'" for one in state.absorbed)
    for name in sorted(own.keys() & state.shapes.keys()):
        if own[name] != tuple(state.shapes[name]):
            raise ShapeError(
                f"'{name}' is {own[name]} in '{expert.name}', {tuple(state.shapes[name])} in the merge so far "
                f"({inside}); one merge needs experts of the same base model."
            )
    if state.t and not own.keys() & state.shapes.keys():
        raise AdapterError(
            f"adapter '{expert.name}' shares no name with the merge so far ('{min(own)}' here, '{min(state.shapes)}' "
            "there); one merge needs experts of one base model, loaded by the same class."
        )


def _check_forms(layers: Collection[str], shapes: Mapping[str, tuple[int, ...]], tensors: Collection[str]) -> None:
    """Raise where one weight has factors here and a dense delta there: they would be merged side by side."""
    for name in layers:
        if f"{name}.weight" in shapes or name in tensors:
            raise AdapterError(
                f"layer '{name}' has factors in one expert and a dense tensor in this or another; expected one form "
                "for all. Give every expert as an adapter, or every one as a full checkpoint (dense deltas)."
            )


def _kinds(state: State, expert: Adapter) -> dict[str, Kind]:
    """Return the kinds of all layers; raise where a layer changes its kind."""
    for name in sorted(expert.layers.keys() & set(state.layers)):
        here, there = expert.kinds.get(name), state.kinds.get(name)
        if here != there:
            raise AdapterError(
                f"layer '{name}' is {here.name if here else 'linear'} in '{expert.name}', "
                f"{there.name if there else 'linear'} in the merge so far; one merge needs experts of one base model."
            )
    return {**state.kinds, **{name: kind for name, kind in expert.kinds.items() if name in expert.layers}}


def _skipped(expert: Adapter) -> dict[str, str]:
    """Return what of the expert cannot take part, with the reason; warn about whole tensors without a base."""
    skipped = {name: "task heads are never merged; every task keeps its own" for name in expert.head}
    if expert.saved:
        reason = "stored whole (modules_to_save or bias); without the base model's own tensor it has no delta"
        skipped |= dict.fromkeys(sorted(expert.saved), reason)
        first = min(expert.saved)
        warnings.warn(
            f"adapter '{expert.name}': {len(expert.saved)} tensors not merged ('{first}', ...): {reason}. Use "
            "adapter.on_base(<tensors of the base model>) first to merge them.",
            stacklevel=4,
        )
    return dict(sorted(skipped.items()))
