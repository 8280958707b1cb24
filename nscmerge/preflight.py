"""Checks before any long work: can these adapters be merged with each other at all?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

from nscmerge.adapters import Adapter, load_adapter
from nscmerge.aligned import aligned
from nscmerge.errors import AdapterError, ShapeError
from nscmerge.factors import check_same_layer
from nscmerge.peft_format import check_tensor

#: Name that an adapter made in memory has if nobody gave it one.
_UNNAMED = Adapter.__dataclass_fields__["name"].default


def preflight(
    adapters: Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path], *, base_model: str | None = None
) -> dict[str, Adapter]:
    """Return the adapters by task name, in the given order, read from disk where paths are given, and checked.

    Layers that adapters spell differently, as the base model was wrapped differently, get the first one's name.

    Args:
        adapters: Adapter objects, folders or hub ids. A mapping's keys are the names; in a sequence, adapters made in
            memory without a name are called ``adapter_0``, ``adapter_1``, ... by position.
        base_model: The base that all share; given, differing ids are no error.

    Raises:
        AdapterError: None at all, one listed twice, two of one name, different base models, no layer in common, a layer
            that is an embedding here and linear there, NaN or Inf; or an adapter cannot be read.
        ShapeError: A layer's or tensor's shape differs between adapters.
    """
    experts = aligned(_named(adapters))
    _check_bases(experts, base_model)
    _check_overlap(experts)
    for layer in sorted({layer for e in experts.values() for layer in e.layers}):
        names = [name for name, e in experts.items() if layer in e.layers]
        check_same_layer([experts[name].layers[layer] for name in names], layer, names)
        kinds = {name: experts[name].kinds.get(layer) for name in names}
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"{kind.name if kind else 'linear'} in '{name}'" for name, kind in kinds.items())
            raise AdapterError(f"layer '{layer}': {said}; one merge needs adapters of the same base model.")
    _check_whole(experts)
    return experts


def _named(adapters: Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path]) -> dict[str, Adapter]:
    """Load what is a path and give every adapter one name."""
    if isinstance(adapters, str | Path | Adapter):
        raise AdapterError(f"one {type(adapters).__name__} given where a list or a mapping of adapters is expected.")
    pairs: list[tuple[str | None, Adapter | str | Path]] = (
        list(adapters.items()) if isinstance(adapters, Mapping) else [(None, adapter) for adapter in adapters]
    )
    if not pairs:
        raise AdapterError("no adapter given; a merge needs one at least. Give folders, hub ids or Adapter objects.")
    _check_once(pairs)
    loaded = []
    for i, (name, adapter) in enumerate(pairs):
        if isinstance(adapter, str | Path):
            adapter = load_adapter(adapter, name=name)
        elif not isinstance(adapter, Adapter):
            raise AdapterError(
                f"adapter {name or i} is a {type(adapter).__name__}; expected an Adapter, a folder or a hub id."
            )
        named = f"{_UNNAMED}_{i}" if adapter.name == _UNNAMED and len(pairs) > 1 else adapter.name
        loaded.append((name if name is not None else named, adapter))
    if double := [name for name, count in Counter(name for name, _ in loaded).items() if count > 1]:
        sources = [str(a.source) for name, a in loaded if name == double[0]]
        raise AdapterError(
            f"{len(sources)} adapters are called '{double[0]}' ({', '.join(sources)}); results are kept by name. Give "
            "a mapping {name: adapter} with names of your own."
        )
    return dict(loaded)


def _check_once(pairs: Sequence[tuple[str | None, Adapter | str | Path]]) -> None:
    """Refuse a folder or hub id that is given twice, before anything is read: it would count twice in every sum."""
    seen: dict[str, str] = {}
    for i, (name, adapter) in enumerate(pairs):
        if not isinstance(adapter, str | Path):
            continue
        place = str(Path(adapter).resolve()) if Path(adapter).exists() else str(adapter)
        who = f"'{name}' ({adapter})" if name is not None else f"number {i + 1} ({adapter})"
        if place in seen:
            raise AdapterError(
                f"adapters {seen[place]} and {who} are one and the same, listed twice, and would count twice. List it "
                "once; to weigh it more, scale its alpha.",
                "listed-twice",
            )
        seen[place] = who


def _check_bases(experts: Mapping[str, Adapter], base_model: str | None) -> None:
    named = [(name, e.base_model) for name, e in experts.items() if e.base_model]
    for (first, a), (second, b) in pairwise(named if base_model is None else []):
        if a != b:
            raise AdapterError(
                f"'{first}' is an adapter of '{a}', '{second}' of '{b}'; one merge needs one base model. If both are "
                "the same weights under two names, give base_model=<its name>."
            )


def _check_overlap(experts: Mapping[str, Adapter]) -> None:
    """Refuse adapters of which no two share any name: almost always one model under two naming schemes."""
    names = {name: {*e.layers, *e.dense, *e.saved} for name, e in experts.items()}
    if empty := [name for name, found in names.items() if not found]:
        raise AdapterError(f"adapter '{empty[0]}' has neither layers nor dense tensors; there is nothing to merge.")
    counts = Counter(layer for found in names.values() for layer in found)
    if len(experts) > 1 and max(counts.values()) == 1:
        shown = ", ".join(f"'{sorted(found)[0]}' in '{name}'" for name, found in names.items())
        raise AdapterError(
            f"no two adapters share a layer ({shown}, ...); one merge needs adapters of one base model, loaded by the "
            "same model class so that layers have the same names."
        )


def _check_whole(experts: Mapping[str, Adapter]) -> None:
    """Check shapes of whole tensors between adapters, and that all values are finite."""
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, e in experts.items():
        for key, tensor in chain(e.saved.items(), e.dense.items()):
            check_tensor(tensor, f"adapter '{name}': tensor '{key}'")
            first, shape = seen.setdefault(key, (name, tuple(tensor.shape)))
            if shape != tuple(tensor.shape):
                raise ShapeError(
                    f"tensor '{key}' is {shape} in '{first}' and {tuple(tensor.shape)} in '{name}'; one merge needs "
                    "adapters of the same base model."
                )
        for layer, factors in e.layers.items():
            for part, tensor in (("A", factors.A), ("B", factors.B)):
                check_tensor(tensor, f"adapter '{name}', layer '{layer}': {part}")
