"""Whole tensors of adapters (``modules_to_save``, trained biases) on a loaded base model: as deltas, and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from nscmerge.adapters import Adapter
from nscmerge.errors import AdapterError
from nscmerge.layer_names import ModelNames

#: One coefficient per linear layer of a projector, as the NSC authors' code has it, or one for all of a projector's.
ProjectorCoefficients = Literal["per_linear", "per_projector"]


def on_model(model: nn.Module, experts: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters with every whole tensor W as its delta W - W0; what equals the base's own is left out.

    PEFT saves all of a module, also what was frozen in it. "Equal" is meant as stored: W0 rounded to the dtype of W.

    Args:
        model: Base model, before anything is attached to it.
        experts: Adapters by task.

    Raises:
        AdapterError: The model lacks a tensor, or has one of another shape.
    """
    names = ModelNames(model)
    found = {}
    for task, adapter in experts.items():
        base = {name: names.tensor(name, task) for name in adapter.saved}
        changed = {name: tensor for name, tensor in adapter.saved.items() if not _equal(tensor, base[name])}
        found[task] = replace(adapter, saved=changed).on_base(base) if adapter.saved else adapter
    return found


def _equal(tensor: Tensor, base: Tensor) -> bool:
    return tensor.shape == base.shape and bool((base.to(tensor) == tensor).all())


@dataclass(frozen=True, eq=False)
class WholeLinear:
    """All tasks' deltas of one linear layer's own tensors.

    Attributes:
        layer: Its name, as the adapters spell it.
        row: Name of its row of coefficients.
        weights: By task number: (d_out, d_in), or None.
        biases: By task number: (d_out,), or None.
    """

    layer: str
    row: str
    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]

    def tasks(self) -> list[int]:
        """Return the numbers of the tasks that change something here."""
        both = zip(self.weights, self.biases, strict=True)
        return [k for k, (weight, bias) in enumerate(both) if weight is not None or bias is not None]


def whole_linears(
    model: nn.Module, experts: Mapping[str, Adapter], rows: ProjectorCoefficients = "per_linear"
) -> list[WholeLinear]:
    """Return the linear layers of which some adapter changes weight or bias as a whole, sorted by name.

    Args:
        model: Base model.
        experts: Adapters by task, after :func:`on_model`.
        rows: ``per_linear``: every layer has a row of coefficients, named like its tensor; ``per_projector``: layers of
            one parent module share a row, named like the module.

    Raises:
        AdapterError: A delta has another shape than the layer's own tensor.
    """
    names = ModelNames(model)
    layers = []
    for tensor in sorted({name for adapter in experts.values() for name in adapter.dense}):
        layer, _, parameter = tensor.rpartition(".")
        path = names.find(layer)
        if parameter in ("weight", "bias") and path is not None and isinstance(names.modules[path], nn.Linear):
            _check_shape(names.modules[path], tensor, experts)
            layers.append(layer)
    found = []
    for layer in dict.fromkeys(layers):
        weights = [adapter.dense.get(f"{layer}.weight") for adapter in experts.values()]
        biases = [adapter.dense.get(f"{layer}.bias") for adapter in experts.values()]
        own = f"{layer}.weight" if any(w is not None for w in weights) else f"{layer}.bias"
        row = layer.rpartition(".")[0] if rows == "per_projector" else own
        found.append(WholeLinear(layer, row, weights, biases))
    return found


def _check_shape(linear: nn.Linear, tensor: str, experts: Mapping[str, Adapter]) -> None:
    width = (linear.out_features,) if tensor.endswith(".bias") else (linear.out_features, linear.in_features)
    for task, adapter in experts.items():
        if tensor in adapter.dense and (got := tuple(adapter.dense[tensor].shape)) != width:
            raise AdapterError(
                f"tensor '{tensor}' of '{task}' is {got}, the base model's {width}; the adapter belongs to another "
                "base model."
            )


def tensor_place(names: ModelNames, tensor: str) -> tuple[str, str] | None:
    """Return (path of the module, parameter) of a tensor that is not the weight of a linear layer; None for any other.

    Args:
        names: Of the base model.
        tensor: Name of a tensor, or of a linear layer.
    """
    layer, _, parameter = tensor.rpartition(".")
    if names.find(tensor) is not None or (path := names.find(layer)) is None:
        return None
    module = names.modules[path]
    if parameter == "weight" and isinstance(module, nn.Linear):
        return None
    return (path, parameter) if isinstance(getattr(module, parameter, None), nn.Parameter) else None
