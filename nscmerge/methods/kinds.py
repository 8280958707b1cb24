"""The two kinds of method: those that see one layer at a time, and those that need all layers at once."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from nscmerge.errors import MethodError, ShapeError
from nscmerge.factors import LowRank
from nscmerge.spectra import relative_error
from nscmerge.stack import Stack

#: (experts, *, lam, ...) -> merged layer; the keyword-only arguments are the method's options.
LayerFunction = Callable[..., LowRank | Tensor]


@dataclass(frozen=True, eq=False)
class Merged:
    """What a method makes of a stack.

    Args:
        layers: Factors or dense deltas by layer, lambda included; may compute each when asked (:class:`Lazy`).
        whole: Deltas of whole tensors, lambda included.
        per_task: For methods that keep per-task weights: by task, then by layer or tensor name.
        relative_error: By layer, |truncated - exact| / |exact|, where the method cuts the rank.
        report: What the receipt should say beyond the options (thresholds, rescalers, what was cut), JSON-able.
    """

    layers: Mapping[str, LowRank | Tensor]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    per_task: Mapping[str, Mapping[str, LowRank | Tensor]] = field(default_factory=dict)
    relative_error: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


#: (stack, *, lam, ...) -> merged; the keyword-only arguments are the method's options.
StackFunction = Callable[..., Merged]


class Method(ABC):
    """One method with its variants. Every variant is a function; its keyword-only arguments are the options.

    Args:
        original: The method of its own paper and code (``variant="original"``).
        papercode: What the NSC authors' released code does instead (``variant="papercode"``), if it differs.
        missing: A layer that a task lacks is a ``zero`` update, or an ``error`` (methods on factors).
    """

    def __init__(
        self,
        original: Callable[..., Any],
        *,
        papercode: Callable[..., Any] | None = None,
        missing: Literal["zero", "error"] = "zero",
    ) -> None:
        self.original, self.missing = original, missing
        self.variants = {"original": original} | ({"papercode": papercode} if papercode else {})

    def options(self, variant: str = "original") -> dict[str, Any]:
        """Return the options of a variant with their defaults."""
        parameters = inspect.signature(self.variants[variant]).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @abstractmethod
    def apply(self, stack: Stack, variant: str, options: Mapping[str, Any]) -> Merged:
        """Run a variant over the stack; options are complete."""


class WholeModel(Method):
    """A method that needs all layers at once, or their names: its functions take the stack."""

    def apply(self, stack: Stack, variant: str, options: Mapping[str, Any]) -> Merged:
        """Run a variant over the stack."""
        merged: Merged = self.variants[variant](stack, **options)
        return merged


class Layerwise(Method):
    """A method that is a pure function of one layer's factors.

    Args:
        original: One layer's K factors to the merged layer.
        whole: Its rule for whole tensors: (deltas, *, lam) -> merged delta.
        exact: What ``original`` approximates by cutting the rank, so that the receipt can state the error.
        papercode: As in :class:`Method`.
        missing: As in :class:`Method`.
    """

    def __init__(
        self,
        original: LayerFunction,
        whole: Callable[..., Tensor],
        *,
        exact: LayerFunction | None = None,
        papercode: LayerFunction | None = None,
        missing: Literal["zero", "error"] = "zero",
    ) -> None:
        super().__init__(original, papercode=papercode, missing=missing)
        self.whole, self.exact = whole, exact

    def apply(self, stack: Stack, variant: str, options: Mapping[str, Any]) -> Merged:
        """Run a variant over all layers, and the rule for whole tensors."""
        function: LayerFunction = self.variants[variant]
        layers: dict[str, LowRank | Tensor] = {}
        errors: dict[str, float] = {}
        for name in stack.watch(stack.layers, "merging"):
            experts = stack.layers[name]
            try:
                merged = function(experts, **options)
            except (ShapeError, MethodError) as error:
                raise type(error)(f"layer '{name}' of {', '.join(map(repr, stack.tasks))}: {error}") from error
            layers[name] = merged
            if self.exact is not None and variant == "original" and isinstance(merged, LowRank):
                exact = self.exact(experts, lam=options["lam"])
                if isinstance(exact, LowRank) and merged.rank < exact.rank:
                    errors[name] = relative_error(merged, exact)
        whole = {name: self.whole(deltas, lam=options["lam"]) for name, deltas in stack.whole.items()}
        return Merged(layers, whole, relative_error=errors)
