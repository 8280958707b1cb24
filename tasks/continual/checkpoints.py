"""Whole fine-tuned checkpoints as experts: the deltas of all their float tensors."""

from __future__ import annotations

import torch
from torch import nn

from nscmerge.adapters import Adapter
from nscmerge.base_model import load_base_model, weights_sha256
from nscmerge.errors import AdapterError
from nscmerge.layer_names import ModelNames
from nscmerge.pretrained import Pretrained


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all ``nn.Linear`` modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def read_checkpoint(source: str, model_class: str, name: str, base: nn.Module) -> Adapter:
    """Return a fine-tuned checkpoint as an expert: theta_t - theta_0 in fp32 of every float parameter, by tensor name.

    What the base model has and the checkpoint lacks (the projection of a vision tower) has no delta: it is the base's.

    Args:
        source: Folder, ``package:NAME/FOLDER`` or hub id.
        model_class: Class of transformers that it is loaded as.
        name: Of its task.
        base: Base model, nothing attached.

    Raises:
        ConfigError: It cannot be loaded.
        AdapterError: It has a parameter that the base model lacks, or of another shape.
    """
    spec = Pretrained(source, model_class=model_class, dtype="float32")
    names = ModelNames(base)
    checkpoint = load_base_model(spec)
    dense = {}
    for tensor, value in checkpoint.named_parameters():
        own = names.tensor(tensor, name)
        if own.shape != value.shape:
            raise AdapterError(
                f"checkpoint '{name}' ({source}): tensor '{tensor}' is {tuple(value.shape)}, the base model's "
                f"{tuple(own.shape)}; experts must be fine-tuned from the base model."
            )
        if value.is_floating_point():
            dense[tensor] = value.detach() - own.detach().to(value.device, torch.float32)
    linear = [layer for layer in linear_names(checkpoint) if f"{layer}.weight" in dense]
    return Adapter(dense=dense, linear=linear, name=name, source=source, sha256=weights_sha256(spec))
