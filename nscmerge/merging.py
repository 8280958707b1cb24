"""Closed-form merging from end to end: check the inputs, run one method over the layers, say what was done."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nscmerge.adapter_files import read_base
from nscmerge.adapters import Adapter
from nscmerge.errors import AdapterError, MethodError, ShapeError
from nscmerge.factors import LowRank
from nscmerge.methods import METHODS, LayerFunction, Method
from nscmerge.naming import unknown
from nscmerge.preflight import preflight as preflight
from nscmerge.spectra import relative_error
from nscmerge.update import Input, Recipe, Update

Adapters = Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path]


def merge(
    adapters: Adapters,
    method: str,
    *,
    base: Mapping[str, Tensor] | str | Path | None = None,
    base_model: str | None = None,
    variant: str = "original",
    **options: Any,
) -> Update:
    """Return the merge of some adapters by one closed-form method. Needs no data, and no base model for LoRA layers.

    Layers are taken in sorted order, tasks in the given one. A layer that a task lacks is a zero update of that task;
    methods that mix factors refuse it. Heads are never merged.

    Args:
        adapters: Adapter objects, folders or hub ids; a mapping gives them names of its own.
        method: A name in :data:`nscmerge.methods.METHODS`.
        base: The base model's tensors by name, or its safetensors file or folder. Only needed to merge whole tensors
            (modules_to_save, trained biases); without it they are left out, with a warning and a line in the receipt.
        base_model: Name of the base model that all adapters share, where they name it differently.
        variant: ``original``, or ``papercode`` where the NSC authors' released code does something else.
        **options: Options of the method, checked by name; ``lam`` (default 1.0) scales the whole update.

    Raises:
        MethodError: Unknown method, variant or option, with the nearest one; an option out of range.
        AdapterError: An input cannot be read, or does not fit the others (see :func:`preflight`).
        ShapeError: Widths (for some methods ranks) differ in a layer.
    """
    entry, function, options = _resolve(method, variant, options)
    experts = preflight(adapters, base_model=base_model)
    if entry.missing == "error":
        _check_complete(experts, method)
    skipped = {
        name: "task heads are never merged; every task keeps its own" for e in experts.values() for name in e.head
    }
    experts = _with_dense(experts, base, skipped)
    start = time.perf_counter()
    layers, errors = _merge_layers(experts, entry, function, options)
    dense = _merge_dense(experts, entry, options["lam"])
    recipe = Recipe(
        method=method,
        variant=variant,
        options=options,
        inputs=tuple(Input.of(name, adapter) for name, adapter in experts.items()),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory(),
        skipped=dict(sorted(skipped.items())),
        relative_error=errors,
    )
    kinds = {name: kind for adapter in experts.values() for name, kind in adapter.kinds.items()}
    shared = next((a.base_model for a in experts.values() if a.base_model), None)
    return Update(layers, dense, base_model or shared, recipe=recipe, kinds=kinds)


def _resolve(method: str, variant: str, given: Mapping[str, Any]) -> tuple[Method, LayerFunction, dict[str, Any]]:
    """Return the table entry, the variant's function, and all options with defaults filled in."""
    if method not in METHODS:
        raise MethodError(unknown("method", method, METHODS))
    entry = METHODS[method]
    if variant not in entry.variants:
        raise MethodError(f"method '{method}': {unknown('variant', variant, entry.variants)}")
    defaults = entry.options(variant)
    for name in given:
        if name not in defaults:
            raise MethodError(f"method '{method}', variant '{variant}': {unknown('option', name, defaults)}")
    options = defaults | dict(given)
    lam = options["lam"]
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
        raise MethodError(f"method '{method}': lam is {lam!r}; expected one finite number for all tasks and layers.")
    return entry, entry.variants[variant], options


def _check_complete(experts: Mapping[str, Adapter], method: str) -> None:
    for layer in sorted({layer for e in experts.values() for layer in e.layers}):
        if lacking := [name for name, e in experts.items() if layer not in e.layers]:
            raise AdapterError(
                f"layer '{layer}': adapter {', '.join(map(repr, lacking))} lacks it, and method '{method}' adds "
                "factors, for which a missing layer is no zero. Use a method on updates, such as task_arithmetic."
            )


def _with_dense(
    experts: dict[str, Adapter], base: Mapping[str, Tensor] | str | Path | None, skipped: dict[str, str]
) -> dict[str, Adapter]:
    """Return the adapters with whole tensors as deltas if ``base`` is there; else note them in ``skipped``."""
    whole = sorted({name for e in experts.values() for name in e.saved})
    if not whole:
        return experts
    if base is not None:
        tensors = base if isinstance(base, Mapping) else read_base(Path(base), whole)
        experts = {name: e.on_base(tensors) for name, e in experts.items()}
        # PEFT stores frozen embeddings beside adapted ones; their zero deltas would be gigabytes of nothing.
        same = {n for n in whole if not any(bool(e.dense[n].any()) for e in experts.values() if n in e.dense)}
        skipped |= dict.fromkeys(sorted(same), "equal to the base model's own tensor in every adapter")
        return {
            name: replace(e, dense={n: d for n, d in e.dense.items() if n not in same}) for name, e in experts.items()
        }
    reason = "stored whole (modules_to_save or bias); without the base model's own tensor it has no delta"
    skipped |= dict.fromkeys(whole, reason)
    shown = ", ".join(whole[:3]) + (f" and {len(whole) - 3} more" if len(whole) > 3 else "")
    warnings.warn(f"not merged: {shown}: {reason}. Give base=<tensors or folder> to merge them.", stacklevel=3)
    return experts


def _merge_layers(
    experts: Mapping[str, Adapter], entry: Method, function: LayerFunction, options: Mapping[str, Any]
) -> tuple[dict[str, LowRank | Tensor], dict[str, float]]:
    """Run the method over all layers; also return the relative error of layers whose rank it cut."""
    layers: dict[str, LowRank | Tensor] = {}
    errors: dict[str, float] = {}
    for name in sorted({layer for e in experts.values() for layer in e.layers}):
        stack = _stack(experts, name)
        try:
            merged = function(stack, **options)
        except (ShapeError, MethodError) as error:
            raise type(error)(f"layer '{name}' of {', '.join(map(repr, experts))}: {error}") from error
        layers[name] = merged
        if entry.exact is not None and function is entry.layer and isinstance(merged, LowRank):
            exact = entry.exact(stack, lam=options["lam"])
            if isinstance(exact, LowRank) and merged.rank < exact.rank:
                errors[name] = relative_error(merged, exact)
    return layers, errors


def _stack(experts: Mapping[str, Adapter], layer: str) -> list[LowRank]:
    """Return one layer of all adapters, in order; a zero update of rank 0 for those that lack it."""
    present = next(e.layers[layer] for e in experts.values() if layer in e.layers)
    zero = LowRank(present.A[:0], present.B[:, :0])
    return [e.layers.get(layer, zero) for e in experts.values()]


def _merge_dense(experts: Mapping[str, Adapter], entry: Method, lam: float) -> dict[str, Tensor]:
    """Apply the method's dense rule to every whole tensor; a task without it counts as zero."""
    merged = {}
    for name in sorted({name for e in experts.values() for name in e.dense}):
        present = next(e.dense[name] for e in experts.values() if name in e.dense)
        deltas = [e.dense.get(name, torch.zeros_like(present)) for e in experts.values()]
        merged[name] = entry.dense(deltas, lam=lam)
    return merged


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
