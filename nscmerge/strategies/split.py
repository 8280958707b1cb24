"""The blocks of a base split over the devices of one process: each device runs its own and passes activations on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nscmerge.checkpointing import blocks
from nscmerge.errors import ConfigError

#: Lists with less of all blocks' weights than this are not split.
SHARE = 0.2


class SplitBase(SingleDeviceStrategy):
    """Model parallelism over blocks, for a base that is too large for one device and a program that is one process.

    Consecutive blocks share a device, in equal numbers; embeddings, a vision tower and the head stand on the first, and
    so do coefficients, inputs and losses. Devices work one after the other: it saves memory, not time. Quantised bases
    can be split, and a pass that ends at the last target layer ends here, too.

    Args:
        devices: Names, such as ``cuda:0``; None takes all GPUs that are visible.

    Raises:
        ConfigError: No device is given and there is no GPU; or the module holds no model with repeated blocks.
    """

    strategy_name = "split_base"

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if devices is None else list(devices)
        if not names:
            raise ConfigError(
                "SplitBase found no GPU to split the base over; state trainer.strategy.init_args.devices, or use one "
                "device (trainer.strategy auto)."
            )
        super().__init__(device=torch.device(names[0]))
        self.devices = [torch.device(name) for name in names]
        self._hooks: list[RemovableHandle] = []

    def model_to_device(self) -> None:
        """Place blocks on their devices and everything else on the first."""
        module: Any = self.lightning_module
        base = getattr(module, "base", None) if hasattr(module, "merged") else getattr(module, "model", None)
        if not isinstance(base, nn.Module):
            raise ConfigError(
                f"SplitBase splits the model of a merge or a benchmark, and {type(module).__name__} holds none."
            )
        self._hooks = split(base, self.devices)
        _place_rest(module, self.root_device, {block for row in rows_to_split(base) for block in row})
        if getattr(module, "merged", None) is not None:
            module.merged.home = self.root_device

    def teardown(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().teardown()


def split(model: nn.Module, devices: Sequence[torch.device]) -> list[RemovableHandle]:
    """Move the large lists of blocks over the devices, let their inputs follow, and return the hooks that see to it.

    What the last block of a list returns goes back to the first device. Lists that hold little of the model, such as
    the vision tower before a language model, stay there whole.

    Raises:
        ConfigError: There are no repeated blocks.
    """
    hooks = []
    for row in rows_to_split(model):
        for i, block in enumerate(row):
            device = devices[i * len(devices) // len(row)]
            block.to(device)
            hooks.append(block.register_forward_pre_hook(_bring_to(device), with_kwargs=True))
        hooks.append(row[-1].register_forward_hook(lambda module, args, out: _moved(out, devices[0])))
    return hooks


def rows_to_split(model: nn.Module) -> list[list[nn.Module]]:
    """Return the lists of equal blocks that hold at least a fifth of all blocks' weights.

    Raises:
        ConfigError: There are no repeated blocks.
    """
    lists: dict[str, list[nn.Module]] = {}
    for name, block in blocks(model).items():
        lists.setdefault(name.rpartition(".")[0], []).append(block)
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks to split; use one device.")
    sizes = {name: sum(p.numel() for block in row for p in block.parameters()) for name, row in lists.items()}
    return [row for name, row in lists.items() if sizes[name] >= SHARE * sum(sizes.values())]


def _bring_to(device: torch.device) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _moved(args, device), _moved(kwargs, device)

    return hook


def _moved(value: Any, device: torch.device) -> Any:
    """Return tensors, and tuples, lists and dicts of them, on ``device``; anything else, such as a cache, as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    return value


def _place_rest(module: nn.Module, device: torch.device, placed: set[nn.Module]) -> None:
    """Move parameters and buffers that are in none of the ``placed`` modules, in place."""
    if module in placed:
        return
    for child in module.children():
        _place_rest(child, device, placed)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
