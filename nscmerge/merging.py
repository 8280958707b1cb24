"""Closed-form merging from end to end: check the inputs, run one method over the layers, say what was done."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nscmerge.adapter_files import read_base
from nscmerge.adapters import Adapter
from nscmerge.errors import MethodError
from nscmerge.memory import peak_memory
from nscmerge.methods import METHODS, Method
from nscmerge.naming import unknown
from nscmerge.preflight import preflight as preflight
from nscmerge.progress import Watch, quiet
from nscmerge.stack import Stack
from nscmerge.truncation import check_truncation, truncate
from nscmerge.update import Input, Recipe, Update

Adapters = Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path]


def merge(
    adapters: Adapters,
    method: str,
    *,
    base: Mapping[str, Tensor] | str | Path | None = None,
    base_model: str | None = None,
    variant: str = "original",
    rank: int | None = None,
    energy: float | None = None,
    watch: Watch = quiet,
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
        rank: Largest rank that a layer keeps, whatever the method: its result is cut after the merge, dense layers
            become factors (see :mod:`nscmerge.truncation`). A method with an option of this name decides itself.
        energy: Share of a layer's squared singular values to keep at least, in (0, 1], by the smallest rank that does;
            with ``rank`` the smaller one counts.
        watch: Wraps the loops over layers, to show progress.
        **options: Options of the method, checked by name; ``lam`` (default 1.0) scales the whole update.

    Raises:
        MethodError: Unknown method, variant or option, with the nearest one; an option out of range.
        AdapterError: An input cannot be read, or does not fit the others (see :func:`preflight`).
        ShapeError: Widths (for some methods ranks) differ in a layer.
    """
    cut = {name: value for name, value in (("rank", rank), ("energy", energy)) if value is not None}
    entry, options = _resolve(method, variant, options | cut)
    experts = preflight(adapters, base_model=base_model)
    skipped = {
        name: "task heads are never merged; every task keeps its own" for e in experts.values() for name in e.head
    }
    experts = _with_dense(experts, base, skipped)
    stack = Stack.of(experts, watch)
    if entry.missing == "error":
        stack.check_complete(method)
    start = time.perf_counter()
    own = entry.options(variant)
    merged = entry.apply(stack, variant, {name: value for name, value in options.items() if name in own})
    if any(name not in own for name in cut):
        merged = truncate(merged, None if "rank" in own else rank, None if "energy" in own else energy, watch)
    recipe = Recipe(
        method=method,
        variant=variant,
        options=options,
        inputs=tuple(Input.of(name, adapter) for name, adapter in experts.items()),
        seed=options.get("seed"),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory(),
        skipped=dict(sorted(skipped.items())),
        relative_error=merged.relative_error,
        extra=merged.report,
    )
    kinds = {name: kind for adapter in experts.values() for name, kind in adapter.kinds.items()}
    shared = next((a.base_model for a in experts.values() if a.base_model), None)
    return Update(merged.layers, merged.whole, base_model or shared, merged.per_task, recipe, kinds)


def _resolve(method: str, variant: str, given: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Return the table entry, and all options with defaults filled in."""
    if method not in METHODS:
        raise MethodError(unknown("method", method, METHODS))
    entry = METHODS[method]
    if variant not in entry.variants:
        raise MethodError(f"method '{method}': {unknown('variant', variant, entry.variants)}")
    defaults = entry.options(variant)
    known = sorted({*defaults, "rank", "energy"})
    for name in given:
        if name not in known:
            raise MethodError(f"method '{method}', variant '{variant}': {unknown('option', name, known)}")
    check_truncation(method, given.get("rank"), given.get("energy"))
    options = defaults | dict(given)
    lam = options["lam"]
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
        raise MethodError(f"method '{method}': lam is {lam!r}; expected one finite number for all tasks and layers.")
    return entry, options


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
