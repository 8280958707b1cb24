"""Find an adapter's layers in a model by their dotted names, check them, and swap modules in and out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import Tensor, nn

from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank


def resolve_layer(model: nn.Module, name: str, owner: str = "adapter") -> str:
    """Return the dotted path of adapter layer ``name`` in ``model``.

    An adapter may have been trained on the bare encoder or on the encoder inside a task model; the two differ by the
    model's own ``base_model_prefix`` (``bert.``, ``model.``), which is added or taken off where that makes a match.

    Raises:
        AdapterError: Neither form names a module.
    """
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    modules = dict(model.named_modules())
    for path in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if path in modules:
            return path
    close = difflib.get_close_matches(name, modules, n=1)
    hint = f" The nearest name there is '{close[0]}'." if close else ""
    raise AdapterError(
        f"layer '{name}' of '{owner}' is not in the base model {type(model).__name__}.{hint} "
        "Adapter and base model must belong together."
    )


def linear_layers(
    model: nn.Module, layers: Mapping[str, LowRank | Tensor], owner: str = "adapter"
) -> dict[str, tuple[str, nn.Linear]]:
    """Return ``{layer name: (path in the model, its nn.Linear)}``, every shape checked.

    Raises:
        AdapterError: A layer is missing, is no ``nn.Linear``, or its (d_out, d_in) differs from the update's.
    """
    return {name: linear_layer(model, name, update, owner) for name, update in layers.items()}


def linear_layer(
    model: nn.Module, name: str, update: LowRank | Tensor, owner: str = "adapter"
) -> tuple[str, nn.Linear]:
    """Return (path in the model, its nn.Linear) of one layer; the shape is that of its update.

    Raises:
        AdapterError: As :func:`linear_layers`.
    """
    path = resolve_layer(model, name, owner)
    linear = model.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise AdapterError(
            f"layer '{name}' of '{owner}' is a {type(linear).__name__} in the base model; only nn.Linear layers "
            "can be run merged. Closed-form merges to disk take the other kinds."
        )
    shape = (update.d_out, update.d_in) if isinstance(update, LowRank) else tuple(update.shape)
    if shape != (expected := (linear.out_features, linear.in_features)):
        raise AdapterError(
            f"layer '{name}' of '{owner}' is {shape} (d_out, d_in), the base model's is {expected}; "
            "the adapter belongs to another base model."
        )
    return path, linear


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` at the dotted ``path``, in place."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
