"""The protocol of continual merging, and the two kinds of method: one name at a time, or the whole model at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.continual.checks import Step
from nscmerge.continual.state import Absorbed, State, Weight
from nscmerge.errors import MethodError
from nscmerge.factors import LowRank
from nscmerge.lazy import Lazy
from nscmerge.progress import Watch, quiet
from nscmerge.update import Input, Recipe, Update


@dataclass(frozen=True, eq=False)
class Merged:
    """What one step makes of a state and an expert.

    Args:
        weights: M_t by name; names that are left out are zero.
        scalars: Numbers that the next step needs.
        tensors: Tensors that the next step needs beside M_t.
        log: By name, what happened there; JSON-able.
    """

    weights: Mapping[str, Weight]
    scalars: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    log: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ContinualMethod(ABC):
    """A continual method with its options, which are its keyword arguments. Holds no state of a merge.

    Args:
        variant: Which of :attr:`VARIANTS`. ``papercode`` is what produced the printed tables; where a method's two
            variants do not differ, both names mean the same.

    Raises:
        MethodError: An option is out of range.
    """

    NAME: ClassVar[str]
    VARIANTS: ClassVar[tuple[str, ...]] = ("default", "papercode")
    #: Options that are objects, not settings: they are no part of a state.
    OBJECTS: ClassVar[tuple[str, ...]] = ()

    variant: str = "default"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise where an option is out of range.

        Raises:
            MethodError: Which, what was got, what was expected.
        """
        lam = getattr(self, "lam", 0.0)
        if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
            raise MethodError(f"{self.NAME}: lam is {lam!r}; expected one finite number.")

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of all options."""
        return [f.name for f in fields(cls) if f.name != "variant"]

    @property
    def options(self) -> dict[str, Any]:
        """All settings, defaults included, JSON-able."""
        return {name: getattr(self, name) for name in self.option_names() if name not in self.OBJECTS}

    def start(self, first: Adapter, *, watch: Watch = quiet) -> State:
        """Return the state after the first expert.

        Args:
            first: An adapter, or the dense deltas of a full checkpoint.
            watch: Wraps loops over names, to show progress.

        Raises:
            AdapterError: It cannot be merged (see :meth:`Step.of`).
        """
        return self._step(State(self.NAME, self.variant, self.options), first, watch)

    def append(self, state: State, next: Adapter, *, watch: Watch = quiet) -> State:
        """Return the state with one more expert. Needs nothing of the earlier ones but ``state``; changes neither.

        Raises:
            AdapterError, ShapeError: The expert does not fit the merge (see :meth:`Step.of`).
            MethodError: The state was made by another method, variant or settings.
        """
        mine = (self.NAME, self.variant, self.options)
        theirs = (state.method, state.variant, dict(state.options))
        if mine != theirs:
            raise MethodError(
                f"the merge so far was made by {_called(*theirs)}, this is {_called(*mine)}; every step needs the "
                "same. Use make(state.method, state.variant, **state.options)."
            )
        return self._step(state, next, watch)

    def update(self, state: State) -> Update:
        """Return what the merge adds to the base model, lambda included: fp32 factors where the method has factors.

        Weights are made when asked for; every name that any expert had answers, with zero where the method leaves the
        base model alone.
        """
        tensors = [name for name in state.shapes if name not in set(state.layers)]
        inputs = tuple(Input(one.name, one.source, one.sha256) for one in state.absorbed)
        skipped = {name: reason for one in state.absorbed for name, reason in one.skipped.items()}
        steps = [{"task": one.name, "log": one.log} for one in state.absorbed]
        recipe = Recipe(
            method=state.method,
            variant=state.variant,
            options=state.options,
            inputs=inputs,
            seed=state.options.get("seed"),
            skipped=dict(sorted(skipped.items())),
            notes=tuple(self.notes(state)),
            extra={"continual": {"t": state.t, "scalars": dict(state.scalars), "steps": steps}},
        )
        return Update(
            Lazy(sorted(state.layers), lambda name: _exported(state.weight(name))),
            Lazy(tensors, lambda name: _whole(state.weight(name))),
            state.base_model,
            recipe=recipe,
            kinds=state.kinds,
        )

    def notes(self, state: State) -> list[str]:
        """Return sentences for the receipt."""
        return []

    @abstractmethod
    def merge(self, step: Step) -> Merged:
        """Return what the step makes: all weights, and what else the next one needs."""

    def _step(self, state: State, expert: Adapter, watch: Watch) -> State:
        step = Step.of(state, expert, watch)
        merged = self.merge(step)
        absorbed = Absorbed(expert.name, expert.source, expert.sha256, merged.log, step.skipped)
        return State(
            self.NAME,
            self.variant,
            self.options,
            step.t,
            merged.weights,
            step.shapes,
            sorted(step.layers),
            step.kinds,
            merged.scalars,
            merged.tensors,
            (*state.absorbed, absorbed),
            state.base_model or expert.base_model,
            step.linear,
        )


@dataclass(frozen=True, kw_only=True)
class Layerwise(ContinualMethod):
    """A method that sees one layer or tensor at a time: M_{t-1} and delta_t of it, and t."""

    def merge(self, step: Step) -> Merged:
        """Run over all names, one at a time."""
        weights: dict[str, Weight] = {}
        log: dict[str, Mapping[str, Any]] = {}
        for name in step.watch(step.names, f"{self.NAME}, step {step.t}"):
            found, line = self.layer(step, name)
            if found is not None:
                weights[name] = found
            if line:
                log[name] = line
        return Merged(weights, log=log)

    @abstractmethod
    def layer(self, step: Step, name: str) -> tuple[Weight | None, Mapping[str, Any]]:
        """Return M_t of one name, None for zero, and what to log about it."""


def _called(method: str, variant: str, options: Mapping[str, Any]) -> str:
    return f"{method} ({', '.join([variant, *(f'{key}={value!r}' for key, value in options.items())])})"


def _exported(weight: Weight) -> Weight:
    """Return a copy in fp32 at most; a zero layer as factors of rank 1, which PEFT can hold."""
    if isinstance(weight, Tensor):
        return weight.to(torch.float32, copy=True)
    if not weight.rank:
        return LowRank(torch.zeros(1, weight.d_in), torch.zeros(weight.d_out, 1))
    wide = weight.A.dtype == torch.float64 or weight.B.dtype == torch.float64
    A, B = (x.to(torch.float32 if wide else x.dtype, copy=True) for x in (weight.A, weight.B))
    return LowRank(A, B, weight.scaling)


def _whole(weight: Weight) -> Tensor:
    return (weight.dense() if isinstance(weight, LowRank) else weight).to(torch.float32, copy=True)
