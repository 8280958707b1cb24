"""``receipt.json``: what an output folder says about where it came from, in and out of JSON."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

import nscmerge
from nscmerge.adapter_files import RECEIPT
from nscmerge.factors import LowRank
from nscmerge.folders import sha256_file
from nscmerge.peft_format import Kind
from nscmerge.spectra import numerical_rank
from nscmerge.update import Input, Recipe, Update


def receipt(update: Update) -> dict[str, Any]:
    """Return what every receipt of ``update`` holds: base model, recipe, versions."""
    content: dict[str, Any] = {"format": 1, "base_model": update.base_model}
    if update.recipe is not None:
        content |= {f.name: plain(getattr(update.recipe, f.name)) for f in fields(update.recipe)}
    content["versions"] = {"python": platform.python_version(), "nscmerge": nscmerge.__version__}
    content["versions"] |= {name: _version(name) for name in ("torch", "peft", "transformers", "safetensors")}
    return content


def layer_line(name: str, weight: LowRank | Tensor, kind: Kind | None) -> dict[str, Any]:
    """Return one layer's line: kind, shape, and for low-rank ones the stored and the numerical rank."""
    line: dict[str, Any] = {"kind": asdict(kind) if kind else {"name": "linear", "shape": []}}
    if isinstance(weight, LowRank):
        shape = [weight.d_out, weight.d_in]
        return line | {"shape": shape, "rank": weight.rank, "numerical_rank": numerical_rank(weight)}
    return line | {"shape": list(weight.shape), "tensor": f"{name}.weight"}


def write_receipt(content: dict[str, Any], folder: Path) -> None:
    """Write ``receipt.json``, with the SHA-256 of every weight file that is in the folder by now."""
    files = sorted(folder.rglob("*.safetensors"))
    content["files"] = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    (folder / RECEIPT).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def recipe_of(content: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe that a receipt holds, None if it names no method."""
    if "method" not in content:
        return None
    known = {f.name: content[f.name] for f in fields(Recipe) if f.name in content}
    return Recipe(**{**known, "inputs": tuple(Input(**entry) for entry in content.get("inputs", []))})


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; a tensor (a given mask) as its shape, dtype and hash."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256_as_fp32": digest}
    if isinstance(value, Input):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
