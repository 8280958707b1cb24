"""timm vision transformers as base models: without a classifier, for images of any size, with q, k and v apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from nscmerge.errors import ConfigError
from nscmerge.naming import nearest
from nscmerge.split_qkv import split_qkv

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def load_timm(name: str, folder: Path | None = None, drop_path: float = 0.0) -> nn.Module:
    """Return a timm vision transformer whose fused attention is split into q, k and v.

    Position embeddings are interpolated to the token grid of each image, so that images need not have the size that the
    model was trained on; their sides must be multiples of the patch.

    Args:
        name: Name in timm's registry (``vit_base_patch16_224.augreg_in21k``), whose weights come from the hub; or how
            the user named ``folder``, for messages.
        folder: Folder with timm's ``config.json`` and ``model.safetensors``; None for a registry name.
        drop_path: Highest rate of stochastic depth (the last block's); acts on modules in training mode only.

    Raises:
        ConfigError: Files are missing or damaged, the name is unknown, the hub cannot be reached, or the model is no
            vision transformer.
    """
    import timm

    if folder is not None:
        _check_folder(name, folder)
    place = name if folder is None else f"local-dir:{folder}"
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        # No classifier: heads are the tasks'. timm itself drops the one that the weights have.
        model: nn.Module = timm.create_model(place, pretrained=True, num_classes=0, dynamic_img_size=True, **options)
    except TypeError as error:
        raise ConfigError(
            f"base model 'timm:{name}' does not take images of any size ({error}). Name a plain vision transformer, "
            "such as vit_base_patch16_224.augreg_in21k."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        known = [] if folder is not None else timm.list_models("vit_*", pretrained=True)
        raise ConfigError(
            f"base model 'timm:{name}' cannot be loaded ({str(error).splitlines()[0]}){nearest(name, known)}. Expected "
            f"a name in timm's registry whose weights the hub has, or a folder with {_CONFIG} and {_WEIGHTS}."
        ) from error
    return split_qkv(model)


def _check_folder(name: str, folder: Path) -> None:
    """Raise unless a folder holds the two files; timm would also open pickles, and names no file that is missing."""
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise ConfigError(
                f"base model 'timm:{name}': {folder / file} is missing. Expected a folder with timm's {_CONFIG} and "
                f"{_WEIGHTS}; weights in other formats are not read."
            )
    try:
        json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"base model 'timm:{name}': {folder / _CONFIG} is damaged; expected JSON with 'architecture', a name in "
            "timm's registry. Copy the folder again."
        ) from error


def write_timm(
    model: nn.Module,
    architecture: str,
    arguments: Mapping[str, Any],
    image_size: tuple[int, int],
    folder: Path,
    *,
    half: bool,
) -> None:
    """Write timm's ``config.json`` and ``model.safetensors`` into an existing folder.

    Args:
        model: A timm model without a classifier, its attention fused as timm builds it.
        architecture: Its name in timm's registry.
        arguments: Constructor arguments in which it differs from that entry.
        image_size: Height and width for which its position embeddings are made.
        folder: Where to.
        half: Store fp16; else fp32.
    """
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": dict(arguments),
        "pretrained_cfg": {"num_classes": 0, "input_size": [3, *image_size], "fixed_input_size": False},
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
