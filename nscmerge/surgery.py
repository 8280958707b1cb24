"""Find an adapter's layers in a model by their dotted names, check them, and swap modules in and out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames


def resolve_layer(model: nn.Module, name: str, owner: str = "adapter") -> str:
    """Return the dotted path of adapter layer ``name`` in ``model``, whatever class wrapped it in training.

    Raises:
        AdapterError: No spelling of the name is a module there; see :mod:`nscmerge.layer_names`.
    """
    return ModelNames(model).path(name, owner)


def linear_layers(
    model: nn.Module, layers: Mapping[str, LowRank | Tensor], owner: str = "adapter"
) -> dict[str, tuple[str, nn.Linear]]:
    """Return ``{layer name: (path in the model, its nn.Linear)}``, every shape checked.

    Raises:
        AdapterError: A layer is missing, is no ``nn.Linear``, or its (d_out, d_in) differs from the update's; or none
            is there, and the adapter belongs to another architecture.
    """
    names = ModelNames(model)
    names.check_architecture(layers, owner)
    return {name: linear_layer(names, name, update, owner) for name, update in layers.items()}


def linear_layer(
    names: ModelNames, name: str, update: LowRank | Tensor, owner: str = "adapter"
) -> tuple[str, nn.Linear]:
    """Return (path in the model, its nn.Linear) of one layer; the shape is that of its update.

    Raises:
        AdapterError: As :func:`linear_layers`.
    """
    path = names.path(name, owner)
    linear = names.modules[path]
    if not isinstance(linear, nn.Linear):
        raise AdapterError(
            f"layer '{name}' of '{owner}' is a {type(linear).__name__} in the base model; only nn.Linear layers "
            "can be run merged. Closed-form merges to disk take the other kinds."
        )
    shape = (update.d_out, update.d_in) if isinstance(update, LowRank) else tuple(update.shape)
    expected = (linear.out_features, linear.in_features)
    if shape != expected:
        raise AdapterError(
            f"layer '{name}' of '{owner}' is {shape} (d_out, d_in), the base model's is {expected}; "
            "the adapter belongs to another base model."
        )
    return path, linear


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` at the dotted ``path``, in place."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
