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
from nscmerge.lazy import Lazy
from nscmerge.merging import merge
from nscmerge.surgery import resolve_layer
from nscmerge.update import Update, Weights, load_update

#: Updates of linear layers by name; dense ones may be computed when asked for.
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
    """Return the layers of an expert.

    Raises:
        AdapterError: It changes something besides linear layers, which the benchmark would leave out.
    """
    if adapter.saved:
        raise AdapterError(
            f"expert '{name}' stores whole tensors ({', '.join(sorted(adapter.saved)[:3])}, ...), which the benchmark "
            "cannot switch on. Leave them out of modules_to_save when training the expert."
        )
    return _linear_layers(model, adapter.layers, adapter.dense, f"expert '{name}'")


def merge_layers(model: nn.Module, update: Update, tasks: Iterable[str], name: str) -> dict[str | None, Layers]:
    """Return the layers of a merge: one entry for all tasks under None, or one per task where it keeps such weights.

    Raises:
        AdapterError: It lacks a task's weights, or changes something besides linear layers.
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
    """Return ``layers`` with the weights in ``dense`` added under their layer's name, each computed when asked for."""
    tensors: dict[str, str] = {}
    for tensor in dense:
        name = tensor.removesuffix(".weight")
        linear = name != tensor and isinstance(model.get_submodule(resolve_layer(model, name, owner)), nn.Linear)
        if not linear:
            raise AdapterError(
                f"{owner} changes '{tensor}', which is not the weight of a linear layer; the benchmark can switch "
                "on linear layers only. Apply the update to the base model and test that."
            )
        tensors[name] = tensor

    def layer(name: str) -> LowRank | Tensor:
        if name not in tensors:
            return layers[name]
        found = [layers[name]] if name in layers else []
        found.append(dense[tensors[name]])
        return reduce(torch.add, (w.dense() if isinstance(w, LowRank) else w for w in found))

    return Lazy(list(dict.fromkeys([*layers, *tensors])), layer)
