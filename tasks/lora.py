"""Put LoRA into a base model with PEFT, and read its factors out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from nscmerge.errors import TargetError
from nscmerge.factors import LowRank

#: PEFT's own name for an adapter that was not named.
DEFAULT = "default"


def add_lora(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> nn.Module:
    """Return ``model``, changed in place: LoRA on the targets, which alone requires a gradient.

    Args:
        model: Base model.
        targets: Suffixes of module names, matched at dots, as PEFT does.
        rank: r.
        alpha: Scaling is alpha / r.
        dropout: On LoRA's input, in training.

    Raises:
        TargetError: No module has such a name.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hit = [target for target in targets if any(name == target or name.endswith(f".{target}") for name in linear)]
    if missing := sorted(set(targets) - set(hit)):
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise TargetError(
            f"target modules {missing} name no linear layer of {type(model).__name__}; its linear layers end in "
            f"{', '.join(kinds)}. Set model.init_args.target_modules."
        )
    injected: nn.Module = inject_adapter_in_model(config, model)
    return injected


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers that carry LoRA by their names in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: LoraLayer, dtype: torch.dtype) -> LowRank:
    """Return one layer's factors, detached, in ``dtype`` on the CPU; its scaling is in B, so scaling is 1."""
    A, B = layer.lora_A[DEFAULT].weight.detach(), layer.lora_B[DEFAULT].weight.detach()
    return LowRank(A.to("cpu", dtype), (layer.scaling[DEFAULT] * B.float()).to("cpu", dtype))


@torch.no_grad()
def set_factors(layer: LoraLayer, update: LowRank) -> None:
    """Give a layer the product of ``update``, so that what is scored is what was written."""
    layer.lora_A[DEFAULT].weight.copy_(update.A)
    layer.lora_B[DEFAULT].weight.copy_(update.B.float() * update.scaling / layer.scaling[DEFAULT])
