"""Adapters of one base model that was wrapped in different classes: their layers under one name each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nscmerge.adapters import Adapter
from nscmerge.layer_names import canonical, same_layer
from nscmerge.lazy import Lazy


def aligned(experts: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters with every layer and whole tensor named as the first adapter that has it names it.

    A form that two names of one adapter have in common tells nothing, and its names stay.
    """
    first: dict[str, str] = {}
    ambiguous: set[str] = set()
    for adapter in experts.values():
        for form, names in same_layer([*adapter.layers, *adapter.dense, *adapter.saved]).items():
            first.setdefault(form, names[0])
            if len(names) > 1:
                ambiguous.add(form)
    return {task: _renamed(adapter, first, ambiguous) for task, adapter in experts.items()}


def _renamed(adapter: Adapter, first: Mapping[str, str], ambiguous: set[str]) -> Adapter:
    names: dict[str, str] = {}
    for old in [*adapter.layers, *adapter.dense, *adapter.saved]:
        form = canonical(old)
        names[old] = old if form in ambiguous else first[form]
    if all(old == new for old, new in names.items()):
        return adapter
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    return replace(
        adapter,
        layers=_keyed(adapter.layers, names),
        kinds=_keyed(adapter.kinds, names),
        dense=_keyed(adapter.dense, names),
        saved=_keyed(adapter.saved, names),
        modules_to_save=[modules.get(module, module) for module in adapter.modules_to_save],
        linear=[modules.get(module, module) for module in adapter.linear],
    )


def _keyed(values: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    old = {names.get(name, name): name for name in values}
    return Lazy(list(old), lambda name: values[old[name]])
