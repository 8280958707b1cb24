"""Activation checkpointing of a frozen base: blocks keep their input alone and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nscmerge.errors import ConfigError
from nscmerge.merged_linear import MergedLinear

#: Arguments by which blocks of transformers take a cache of keys and values.
CACHES = ("past_key_values", "past_key_value", "layer_past")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by their dotted names: members of outermost lists of equal modules."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential) and _repeats(module):
            found |= {f"{name}.{child}" if name else child: block for child, block in module.named_children()}
    return found


def _repeats(module: nn.Module) -> bool:
    children = list(module.children())
    return len(children) > 1 and len({type(child) for child in children}) == 1 and any(children[0].children())


def checkpoint_blocks(model: nn.Module) -> Callable[[], None]:
    """Make every repeated block of ``model`` recompute its activations in the backward pass; return what undoes it.

    A block that an objective reads from in the pass at hand runs as ever: what is read, and where the pass is cut, must
    not depend on a second run. So the blocks before the first target layer are recomputed, and, where an objective
    reads the output alone, all of them. Without gradient nothing changes.

    Args:
        model: Frozen base, in eval mode: no randomness that a second run would draw anew.

    Raises:
        ConfigError: The model has no repeated blocks.
    """
    found = blocks(model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks to recompute; switch activation checkpointing off."
        )
    for block in found.values():
        block.forward = partial(_recomputed, block, block.forward)

    def undo() -> None:
        for block in found.values():
            block.__dict__.pop("forward", None)

    return undo


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or _is_read(block):
        return forward(*args, **kwargs)
    # A cache would be filled twice. It is empty here: whoever generates with one does so without gradient.
    kwargs |= {name: None for name in CACHES if kwargs.get(name) is not None}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _is_read(block: nn.Module) -> bool:
    return any(isinstance(module, MergedLinear) and module.on_input is not None for module in block.modules())
