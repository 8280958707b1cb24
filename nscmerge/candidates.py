"""What an evaluation compares, as updates that can be switched on in one base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nscmerge.adapters import Adapter
from nscmerge.base_model import resolve_source
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.lazy import Lazy
from nscmerge.merging import merge
from nscmerge.update import Update, Weights, load_update
from nscmerge.whole import tensor_place

#: Updates of linear layers by name, and of other tensors by theirs; dense ones may be computed when asked for.
Layers = Weights


@dataclass(frozen=True)
class ClosedForm:
    """A merge of the tested experts by a closed-form method, made on the spot instead of read from a folder.

    Args:
        method: A name in :data:`nscmerge.methods.METHODS`.
        lam: Scale of the update.
        variant: ``original``, or ``papercode`` where the method has one.
        options: The method's other options.
        only: Merge these experts alone, whatever is tested; None merges all.
    """

    method: str
    lam: float = 1.0
    variant: str = "original"
    options: dict[str, Any] = field(default_factory=dict)
    only: list[str] | None = None

    def merge(self, experts: Mapping[str, Adapter]) -> Update:
        """Return the merge; raises as :func:`nscmerge.merging.merge`.

        Raises:
            ConfigError: ``only`` names an expert that is not there.
        """
        if unknown := sorted(set(self.only or ()) - set(experts)):
            raise ConfigError(f"'{self.method}' is to merge {unknown} only; there are the experts {sorted(experts)}.")
        chosen = experts if self.only is None else {task: experts[task] for task in self.only}
        return merge(chosen, self.method, variant=self.variant, lam=self.lam, **self.options)


def expert_layers(model: nn.Module, adapter: Adapter, name: str) -> Layers:
    """Return the layers and whole tensors of an expert.

    Raises:
        AdapterError: It stores whole tensors whose deltas are not known yet (see :func:`nscmerge.whole.on_model`), or
            one that the model does not have.
    """
    if adapter.saved:
        raise AdapterError(
            f"expert '{name}' stores whole tensors ({', '.join(sorted(adapter.saved)[:3])}, ...), which have a delta "
            "only beside the base model: nscmerge.whole.on_model gives it."
        )
    return _linear_layers(model, adapter.layers, adapter.dense, f"expert '{name}'")


def merge_layers(model: nn.Module, update: Update, tasks: Iterable[str], name: str) -> dict[str | None, Layers]:
    """Return the layers of a merge: one entry for all tasks under None, or one per task where it keeps such weights.

    Raises:
        AdapterError: It lacks a task's weights, or has a tensor that the model does not have.
    """
    if not update.per_task:
        return {None: _linear_layers(model, update.layers, update.dense, f"merge '{name}'")}
    if missing := sorted(set(tasks) - set(update.per_task)):
        raise AdapterError(
            f"merge '{name}' keeps weights per task, for {', '.join(sorted(update.per_task))}, but not for "
            f"{', '.join(missing)}. Merge the experts of all tasks that are tested."
        )
    found: dict[str | None, Layers] = {}
    for task in tasks:
        names = dict.fromkeys([*update.layers, *update.dense, *update.per_task[task]])
        whole = [key for key in names if key in update.dense or (key not in update.layers and _whole(key))]
        layers = Lazy([key for key in names if key not in whole], partial(update.weight, task=task))
        dense = Lazy(whole, partial(update.weight, task=task))
        found[task] = _linear_layers(model, layers, dense, f"merge '{name}', task '{task}'")
    return found


def read_merge(source: str | Path | ClosedForm, experts: Mapping[str, Adapter]) -> Update:
    """Return the update of a merge folder (``package:`` sources included), or make it of ``experts``."""
    if isinstance(source, ClosedForm):
        return source.merge(experts)
    return load_update(resolve_source(str(source)))


def _whole(name: str) -> bool:
    """True for the name of a tensor, as opposed to a layer."""
    return name.endswith((".weight", ".bias"))


def _linear_layers(model: nn.Module, layers: Weights, dense: Weights, owner: str) -> Layers:
    """Return ``layers`` with ``dense`` added, each computed when asked for.

    The weight of a linear layer stands under the layer's name, any other whole tensor under its own.
    """
    names = ModelNames(model)
    names.check_architecture([*layers, *(tensor.rpartition(".")[0] for tensor in dense)], owner)
    tensors: dict[str, str] = {}
    for tensor in dense:
        layer, _, parameter = tensor.rpartition(".")
        linear = parameter == "weight" and isinstance(names.modules[names.path(layer, owner)], nn.Linear)
        if not linear and tensor_place(names, tensor) is None:
            raise AdapterError(
                f"{owner} changes '{tensor}', and the base model {type(model).__name__} has no parameter of that name. "
                "Adapter and base model must belong together."
            )
        tensors[layer if linear else tensor] = tensor

    def update(name: str) -> LowRank | Tensor:
        if name not in tensors:
            return layers[name]
        found = [layers[name]] if name in layers else []
        found.append(dense[tensors[name]])
        return reduce(torch.add, (w.dense() if isinstance(w, LowRank) else w for w in found))

    return Lazy(list(dict.fromkeys([*layers, *tensors])), update)
