"""What is odd about one adapter, and what keeps several from being merged with each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from nscmerge.adapters import Adapter
from nscmerge.doctor.findings import Finding, some
from nscmerge.doctor.intake import Candidate
from nscmerge.doctor.overlap import Survey
from nscmerge.methods import METHODS
from nscmerge.peft_format import is_vocabulary

#: Methods that add factors and so refuse unequal ranks (spec: raise, do not pad or truncate).
EQUAL_RANKS = ("linear", "robust_merge")


def _factor_methods() -> str:
    """Names of the methods on factors, for which a missing layer is no zero update and s < 0 has no root."""
    return ", ".join(name for name, method in METHODS.items() if method.missing == "error")


def check_alone(candidate: Candidate, survey: Survey) -> Iterator[Finding]:
    """Yield what is odd about one adapter by itself."""
    adapter, name = candidate.adapter, candidate.name
    if adapter is None:
        return
    if layers := survey.overflowing[name]:
        found = f"The update of {some(layers)} overflows fp32, although its factors are finite."
        yield Finding("not-finite", found, (name,), tuple(layers))
    zero = [layer for layer, norm in survey.norms[name].items() if norm == 0]
    if zero and len(zero) == len(survey.norms[name]) and not candidate.broken:
        yield Finding("zero-update", f"All {len(zero)} layers are zero updates: A, B or alpha is 0.", (name,))
    elif zero:
        yield Finding("zero-layers", f"{len(zero)} layers are zero updates: {some(zero)}.", (name,), tuple(zero))
    ranks = {layer: (rank, adapter.layers[layer].rank) for layer, rank in survey.ranks[name].items()}
    if deficient := [layer for layer, (rank, stored) in ranks.items() if 0 < rank < stored]:
        rank, stored = ranks[deficient[0]]
        found = f"{len(deficient)} layers have a lower numerical rank than stored: {rank} of {stored} in "
        yield Finding("rank-deficient", f"{found}{some(deficient)}.", (name,), tuple(deficient))
    if negative := [layer for layer, factors in adapter.layers.items() if factors.scaling < 0]:
        found = f"Scaling is {adapter.layers[negative[0]].scaling:g} in {some(negative)}; refused by "
        yield Finding("negative-scaling", f"{found}{_factor_methods()}.", (name,), tuple(negative))


def check_whole(candidates: Sequence[Candidate]) -> Iterator[Finding]:
    """Yield which sound adapters hold more than factors: task heads, tensors stored whole, dense deltas."""
    sound = [c.adapter for c in candidates if c.adapter is not None and not c.faults]
    for code, group, what in (
        ("task-head", "head", "belong to task heads"),
        ("whole-tensors", "saved", "are stored whole (modules_to_save, trained biases)"),
        ("dense-deltas", "dense", "are dense deltas"),
    ):
        owners = tuple(a.name for a in sound if getattr(a, group))
        tensors = tuple(sorted({name for a in sound for name in getattr(a, group)}))
        if tensors:
            yield Finding(code, f"{len(tensors)} tensors {what}: {some(tensors)}.", owners, tensors)


def check_list(candidates: Sequence[Candidate]) -> Iterator[Finding]:
    """Yield what is wrong with the list itself: one adapter only, one twice, two of one name."""
    if len(candidates) == 1:
        yield Finding("single-adapter", "Only one adapter is given.", (candidates[0].name,))
    places: dict[str, list[str]] = {}
    for c in candidates:
        if c.folder is not None:
            places.setdefault(os.path.realpath(c.folder), []).append(c.name)
    twice = {place: tuple(names) for place, names in places.items() if len(names) > 1}
    for names in twice.values():
        yield Finding("listed-twice", f"The same folder is listed {len(names)} times.", names)
    hashes: dict[str, list[str]] = {}
    for c in candidates:
        if c.adapter is not None and c.adapter.sha256 and (c.folder is None or os.path.realpath(c.folder) not in twice):
            hashes.setdefault(c.adapter.sha256, []).append(c.name)
    for digest, same in hashes.items():
        if len(same) > 1:
            found = f"The weight files are equal byte for byte (SHA-256 {digest[:12]}), in different folders."
            yield Finding("duplicate-file", found, tuple(same))


def check_bases(candidates: Sequence[Candidate], base: str | None) -> Iterator[Finding]:
    """Yield differing or unknown names of the base model; with ``base`` given, differing names are no error."""
    known = [c for c in candidates if c.adapter is not None]
    bases: dict[str, list[str]] = {}
    for c in known:
        if c.adapter is not None and c.adapter.base_model:
            bases.setdefault(c.adapter.base_model, []).append(c.name)
    if len(bases) > 1:
        said = "; ".join(f"'{model}' of {some(names)}" for model, names in bases.items())
        code = "base-mismatch" if base is None else "base-names-differ"
        yield Finding(
            code, f"{len(bases)} base models are named: {said}.", tuple(n for ns in bases.values() for n in ns)
        )
    if unnamed := [c.name for c in known if c.adapter is not None and not c.adapter.base_model]:
        yield Finding("base-unknown", f"No base model is named in {some(unnamed)}.", tuple(unnamed))


def check_shapes(candidates: Sequence[Candidate]) -> Iterator[Finding]:
    """Yield layers and whole tensors whose shape or kind differs between adapters; one finding for equal faults."""
    adapters = {c.name: c.adapter for c in candidates if c.adapter is not None}
    groups: dict[tuple[str, tuple[tuple[str, object], ...]], list[str]] = {}
    for name in sorted({name for adapter in adapters.values() for name in _shapes(adapter)}):
        shapes = {who: shape for who, adapter in adapters.items() if (shape := _shapes(adapter).get(name)) is not None}
        kinds = {who: _kind(adapters[who], name) for who in shapes}
        if len(set(kinds.values())) > 1:
            groups.setdefault(("kind-mismatch", tuple(kinds.items())), []).append(name)
        elif len(set(shapes.values())) > 1:
            rows_only = is_vocabulary(name) and len({shape[1:] for shape in shapes.values()}) == 1
            code = "vocabulary-mismatch" if rows_only else "width-mismatch"
            groups.setdefault((code, tuple(shapes.items())), []).append(name)
    for (code, values), layers in groups.items():
        by_value: dict[object, list[str]] = {}
        for who, value in values:
            by_value.setdefault(value, []).append(who)
        said = "; ".join(f"{value} in {some(names)}" for value, names in by_value.items())
        yield Finding(code, f"{some(layers)}: {said}.", tuple(who for who, _ in values), tuple(layers))


def _shapes(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    whole = {name: tuple(tensor.shape) for name, tensor in {**adapter.dense, **adapter.saved}.items()}
    return {**whole, **{layer: (factors.d_out, factors.d_in) for layer, factors in adapter.layers.items()}}


def _kind(adapter: Adapter, name: str) -> str:
    if name not in adapter.layers:
        return "whole tensor"
    return kind.name if (kind := adapter.kinds.get(name)) else "linear"


def check_layers(candidates: Sequence[Candidate]) -> Iterator[Finding]:
    """Yield layers that some adapters lack, unequal ranks and mixed dtypes."""
    adapters = {c.name: c.adapter for c in candidates if c.adapter is not None}
    names = {c.name: {*c.adapter.layers, *c.adapter.dense, *c.adapter.saved} for c in candidates if c.adapter}
    if len(names) > 1 and all(names.values()) and not any(a & b for a, b in combinations(names.values(), 2)):
        shown = ", ".join(f"'{min(found)}' in '{name}'" for name, found in names.items())
        yield Finding("no-shared-layer", f"No two adapters share a layer: {shown}.", tuple(names))
        return
    lacking: dict[tuple[str, ...], list[str]] = {}
    broken = {c.name: set(c.broken) for c in candidates}
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.layers}):
        without = tuple(n for n, a in adapters.items() if layer not in a.layers and layer not in broken[n])
        if without:
            lacking.setdefault(without, []).append(layer)
    for without, layers in lacking.items():
        found = f"{len(layers)} layers are lacking, which others have: {some(layers)}. Methods on updates take zero"
        found += f" there; {_factor_methods()} refuse."
        yield Finding("missing-layers", found, without, tuple(layers))
    unequal = []
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.layers}):
        ranks = {name: a.layers[layer].rank for name, a in adapters.items() if layer in a.layers}
        if len(set(ranks.values())) > 1:
            unequal.append((layer, ranks))
    if unequal:
        layer, ranks = unequal[0]
        said = ", ".join(f"{rank} in '{name}'" for name, rank in ranks.items())
        found = f"Ranks differ between adapters in {len(unequal)} layers, first in '{layer}': {said}. Refused by "
        found += f"{', '.join(EQUAL_RANKS)}."
        yield Finding("unequal-ranks", found, tuple(adapters), tuple(layer for layer, _ in unequal))
    dtypes = {name: ", ".join(dtypes_of(adapter)) for name, adapter in adapters.items()}
    if len(set(dtypes.values())) > 1:
        said = "; ".join(f"{dtype} in '{name}'" for name, dtype in dtypes.items())
        yield Finding("mixed-dtypes", f"Stored dtypes differ: {said}.", tuple(dtypes))


def dtypes_of(adapter: Adapter) -> list[str]:
    """Return the dtypes of an adapter's factors, or of its dense deltas if it has no factors, by name, sorted."""
    tensors = [t for f in adapter.layers.values() for t in (f.A, f.B)] or list(adapter.dense.values())
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
