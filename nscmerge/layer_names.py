"""One layer, many spellings: how the class that wrapped a base model, and its version, colour the names of its layers.

The decoder block of a LLaVA is ``model.language_model.layers.0`` in transformers since 4.52, ``language_model.model.
layers.0`` before, and ``model.layers.0`` in the original code; that of a LLaMA is ``layers.0``, or ``model.layers.0``
inside a task model. All mean the same (container, block index, module) and have one canonical form.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from nscmerge.errors import AdapterError

#: Parts of a dotted name that say how a model is wrapped, and nothing about the layer.
WRAPPERS = frozenset({"model", "base_model", "language_model", "vision_model"})
#: Names of the original LLaVA code, and what transformers calls the same.
_RENAMED = {
    "mm_projector.0": "multi_modal_projector.linear_1",
    "mm_projector.2": "multi_modal_projector.linear_2",
}


def canonical(name: str) -> str:
    """Return the form that all spellings of one layer, or tensor, have in common."""
    parts: list[str] = []
    for part in name.split("."):
        # The original LLaVA code says 'vision_tower.vision_tower'.
        if part not in WRAPPERS and part not in parts[-1:]:
            parts.append(part)
    found = f".{'.'.join(parts)}."
    for old, new in _RENAMED.items():
        found = found.replace(f".{old}.", f".{new}.")
    return found.strip(".")


def same_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by their canonical form."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        found[canonical(name)].append(name)
    return dict(found)


class ModelNames:
    """The modules of one model, found by any spelling of their names.

    Args:
        model: Base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")

    @cached_property
    def _by_canonical(self) -> Mapping[str, list[str]]:
        # Containers are left out: 'model' and 'model.language_model' would be one.
        return same_layer(name for name, module in self.modules.items() if any(True for _ in module.parameters(False)))

    def find(self, name: str) -> str | None:
        """Return the path of layer ``name``, or None where the model has no such layer, or several.

        As it stands; without or with the model's own ``base_model_prefix`` (``bert.``); else by canonical form.
        """
        for path in (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"):
            if path in self.modules:
                return path
        found = self._by_canonical.get(canonical(name), [])
        return found[0] if len(found) == 1 else None

    def path(self, name: str, owner: str = "adapter") -> str:
        """Return the path of layer ``name``.

        Raises:
            AdapterError: The model has no such layer.
        """
        if (path := self.find(name)) is not None:
            return path
        close = difflib.get_close_matches(name, self.modules, n=1)
        hint = f" The nearest name there is '{close[0]}'." if close else ""
        raise AdapterError(
            f"layer '{name}' of '{owner}' is not in the base model {type(self.model).__name__}.{hint} "
            "Adapter and base model must belong together."
        )

    def check_architecture(self, names: Iterable[str], owner: str) -> None:
        """Raise if not one of an adapter's many layers is in the model: then it belongs to another one altogether.

        Raises:
            AdapterError: With an example from either side.
        """
        names = list(names)
        if len(names) < 2 or any(self.find(name) is not None for name in names):
            return
        linear = [name for name, module in self.modules.items() if isinstance(module, nn.Linear)]
        own = difflib.get_close_matches(names[0], linear, n=1, cutoff=0.0)
        raise AdapterError(
            f"'{owner}' is an adapter for another architecture: the base model {type(self.model).__name__} has none of "
            f"its {len(names)} layers ('{names[0]}', ...); layers there are called like '{own[0] if own else '-'}'. "
            "Give the base model that its adapter_config.json names, or leave the adapter out."
        )

    def tensor(self, name: str, owner: str = "adapter") -> Tensor:
        """Return the model's own tensor of any spelling of its name; a quantised weight as its values.

        Raises:
            AdapterError: The model has no such tensor.
        """
        layer, _, parameter = name.rpartition(".")
        module = self.modules[self.path(layer, owner)]
        found = getattr(module, parameter, None)
        if not isinstance(found, Tensor):
            raise AdapterError(
                f"tensor '{name}' of '{owner}': the base model's {type(module).__name__} there has no '{parameter}'. "
                "Adapter and base model must belong together."
            )
        if not found.is_floating_point():
            from peft.utils.integrations import dequantize_module_weight

            found = dequantize_module_weight(module)
        with torch.no_grad():
            return found.detach()
