"""Put LoRA into a base model with PEFT, train other modules whole, and read both out again."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nscmerge.errors import ConfigError, TargetError
from nscmerge.factors import LowRank

#: PEFT's own name for an adapter that was not named.
DEFAULT = "default"


def add_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float, exclude: Sequence[str] = ()
) -> nn.Module:
    """Return ``model``, changed in place: LoRA on the targets, which alone requires a gradient and is fp32.

    Args:
        model: Base model.
        targets: Suffixes of module names, matched at dots, as PEFT does.
        rank: r.
        alpha: Scaling is alpha / r.
        dropout: On LoRA's input, in training.
        exclude: Parts of the model that stay as they are: layers with such a name among theirs, matched at dots.

    Raises:
        TargetError: No module has such a name.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    within = [name for name in linear if not any(f".{part}." in f".{name}." for part in exclude)]
    hit = {target: [name for name in within if _ends(name, target)] for target in targets}
    if missing := sorted(target for target, names in hit.items() if not names):
        kinds = sorted({name.rpartition(".")[2] for name in within})
        outside = f" outside of {', '.join(exclude)}" if exclude else ""
        raise TargetError(
            f"target modules {missing} name no linear layer of {type(model).__name__}{outside}; its linear layers end "
            f"in {', '.join(kinds)}. Set model.init_args.target_modules."
        )
    # A pattern of whole names: PEFT would match a list at the end of any name, excluded or not.
    pattern = "|".join(re.escape(name) for name in within if any(name in names for names in hit.values()))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=f"({pattern})", lora_dropout=dropout)
    injected: nn.Module = inject_adapter_in_model(config, model)
    _to_fp32(injected)
    return injected


def train_whole(model: nn.Module, names: Sequence[str], bias: bool = False) -> list[str]:
    """Let modules be trained whole, in fp32, and return their full names.

    Args:
        model: Base model, after :func:`add_lora`.
        names: Suffixes of the modules' names, matched at dots.
        bias: Train their biases too; if not, only their weights.

    Raises:
        TargetError: No module has such a name, or it has no weight, or carries LoRA.
    """
    found = []
    for wanted in names:
        hit = {name: module for name, module in model.named_modules() if _ends(name, wanted)}
        if not hit:
            raise TargetError(
                f"modules_to_save names '{wanted}', and {type(model).__name__} has no such module; its parts are "
                f"{', '.join(name for name, _ in model.named_children())}. Set model.init_args.modules_to_save."
            )
        for name, module in hit.items():
            if isinstance(module, LoraLayer) or not isinstance(getattr(module, "weight", None), nn.Parameter):
                raise TargetError(
                    f"modules_to_save names '{name}', {type(module).__name__}, which "
                    f"{'carries LoRA' if isinstance(module, LoraLayer) else 'has no weight of its own'}; "
                    "name single layers that are not among target_modules."
                )
            module.get_parameter("weight").requires_grad_(True)
            if bias and isinstance(module.bias, nn.Parameter):
                module.bias.requires_grad_(True)
        found += list(hit)
    _to_fp32(model)
    return found


def check_one_dtype(model: nn.Module, whole: Sequence[str]) -> None:
    """Raise ConfigError if layers trained whole, in fp32, stand in a base of another dtype: they need autocast."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if whole and len(dtypes) > 1:
        raise ConfigError(
            f"the model holds {', '.join(sorted(map(str, dtypes)))} and {', '.join(whole)} are trained in fp32; set "
            "trainer.precision=bf16-mixed, or the base model's dtype to float32."
        )


def whole_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return weights and biases of modules by tensor name, detached, on the CPU, as they are: a delta is small."""
    return {
        f"{name}.{kind}": tensor.detach().cpu()
        for name in names
        for kind, tensor in model.get_submodule(name).named_parameters(recurse=False)
    }


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


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _to_fp32(model: nn.Module) -> None:
    """Hold what is trained in fp32: steps of a small learning rate would be lost in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
