"""One frozen base, many updates, one of them active at a time: what evaluation of several merges runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nscmerge.errors import ConfigError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.quantized import factor_like
from nscmerge.surgery import linear_layer, replace_module
from nscmerge.switch_tensor import SwitchTensor
from nscmerge.whole import tensor_place

#: By layer name the update of a linear layer's weight; by tensor name (1-D, or not of a linear layer) a whole delta.
Layers = Mapping[str, LowRank | Tensor]


class SwitchLinear(nn.Module):
    """A frozen linear layer plus the one of its updates that is active; weights are never mutated."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active: str | None = None
        self.scale = 1.0
        self._names: dict[str, int] = {}

    def add(self, name: str, update: LowRank | Tensor) -> None:
        """Keep ``update`` under ``name``, in the base weight's dtype, scaling folded into B."""
        index = self._names.setdefault(name, len(self._names))
        like = factor_like(self.base)
        if isinstance(update, LowRank):
            self.register_buffer(f"A{index}", update.A.to(like), persistent=False)
            # fp32 for the product with the scaling: one rounding instead of two where the base is half precision.
            self.register_buffer(f"B{index}", (update.B.float() * update.scaling).to(like), persistent=False)
        else:
            self.register_buffer(f"D{index}", update.to(like), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + scale * delta(x) of the active update, (..., d_out)."""
        out: Tensor = self.base(x)
        index = self._names.get(self.active) if self.active is not None else None
        if index is None:
            return out
        dense = getattr(self, f"D{index}", None)
        if dense is not None:
            return torch.add(out, nn.functional.linear(x, dense.to(x.dtype)), alpha=self.scale)
        # Beside a quantised layer factors are held wider than what runs through it.
        A, B = getattr(self, f"A{index}").to(x.dtype), getattr(self, f"B{index}").to(x.dtype)
        return torch.add(out, nn.functional.linear(nn.functional.linear(x, A), B), alpha=self.scale)


class Switch:
    """Handle of all that is switched in one model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SwitchLinear],
        names: frozenset[str],
        tensors: Sequence[SwitchTensor] = (),
    ) -> None:
        self._model, self._layers, self._names, self._tensors = model, layers, names, tensors

    def activate(self, name: str | None, scale: float = 1.0) -> None:
        """Make ``name`` the active update everywhere; None gives the plain base model.

        Args:
            name: Of an attached update.
            scale: Multiplies it: merges are linear in lambda, so one attached update serves every candidate scale.

        Raises:
            ConfigError: No update of that name was attached.
        """
        if name is not None and name not in self._names:
            raise ConfigError(f"no update '{name}' is attached; attached are: {', '.join(sorted(self._names))}.")
        for layer in self._layers.values():
            layer.active, layer.scale = name, scale
        for tensor in self._tensors:
            tensor.activate(name, scale)

    def detach(self) -> None:
        """Put the base layers and tensors back, in place, and let go of the updates."""
        for tensor in self._tensors:
            tensor.activate(None)
        for path, layer in self._layers.items():
            replace_module(self._model, path, layer.base)


def by_update(active: Mapping[str, str | None]) -> dict[str | None, list[str]]:
    """Return the tasks by the update that is active for them, from the update by task: one pass serves each list."""
    found: dict[str | None, list[str]] = {}
    for task, update in active.items():
        found.setdefault(update, []).append(task)
    return found


def attach_switch(model: nn.Module, candidates: Mapping[str, Layers]) -> Switch:
    """Replace every linear layer that some candidate updates, in place, and return the handle.

    Args:
        model: Frozen base model.
        candidates: ``{candidate: {layer name: LowRank | (d_out, d_in) tensor}}``; a whole tensor that is no linear
            layer's weight stands under its own name, which ends in the parameter's (``norm.weight``, ``fc.bias``).

    Raises:
        AdapterError: A layer or tensor is missing from the model, or has another shape.
    """
    names = ModelNames(model)
    switched: dict[str, SwitchLinear] = {}
    tensors: dict[str, SwitchTensor] = {}
    for candidate, layers in candidates.items():
        for name in layers:
            update = layers[name]  # once: dense ones may be computed, or read, when asked for
            if isinstance(update, Tensor) and (place := tensor_place(names, name)) is not None:
                path = ".".join(place)
                if path not in tensors:
                    tensors[path] = SwitchTensor(names.modules[place[0]], place[1])
                tensors[path].add(candidate, update, name)
                continue
            path, linear = linear_layer(names, name, update, owner=candidate)
            if path not in switched:
                switched[path] = SwitchLinear(linear)
            switched[path].add(candidate, update)
    for path, layer in switched.items():
        replace_module(model, path, layer)
    model.eval()
    return Switch(model, switched, frozenset(candidates), list(tensors.values()))
