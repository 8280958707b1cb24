"""Merge folders: weights, and beside them where they came from (``receipt.json``) and how to use them (card)."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

import nscmerge
from nscmerge.adapter_files import DELTA, RECEIPT
from nscmerge.adapters import Adapter, read_folder, write_adapter
from nscmerge.card import card
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.folders import sha256_file
from nscmerge.peft_format import Kind
from nscmerge.spectra import numerical_rank
from nscmerge.update import Input, Recipe, Update

#: Sub-folder with one adapter per task, where a method keeps per-task weights.
TASKS = "tasks"


def write_update(update: Update, folder: Path) -> None:
    """Write weights, receipt and card of ``update`` into an existing folder."""
    write_adapter(_adapter(update.layers, update.dense, update), folder)
    for task, weights in update.per_task.items():
        if not re.fullmatch(r"\w[\w. -]*", task):
            raise AdapterError(f"task name {task!r} cannot be a folder name; use letters, digits, '.', '_' and '-'.")
        (folder / TASKS / task).mkdir(parents=True)
        layers = {n: w for n, w in weights.items() if n in update.layers}
        dense = {n: w for n, w in weights.items() if n not in update.layers and isinstance(w, Tensor)}
        write_adapter(_adapter(layers, dense, update, task), folder / TASKS / task)
    content = receipt(update)
    content["files"] = {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / RECEIPT).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(update), encoding="utf-8")


def _adapter(
    layers: Mapping[str, LowRank | Tensor], dense: Mapping[str, Tensor], update: Update, name: str = "merged"
) -> Adapter:
    """Return weights as an :class:`Adapter`: dense layers become deltas of the tensor ``<layer>.weight``."""
    low = {n: w for n, w in layers.items() if isinstance(w, LowRank)}
    deltas = dict(dense)
    for layer, weight in layers.items():
        if isinstance(weight, Tensor):
            kind = update.kinds.get(layer)
            shape = (len(weight), *kind.shape) if kind and kind.shape else weight.shape
            deltas[f"{layer}.weight"] = weight.reshape(shape)
    kinds = {n: kind for n, kind in update.kinds.items() if n in low}
    return Adapter(low, update.base_model, deltas, name=name, kinds=kinds)


def receipt(update: Update) -> dict[str, Any]:
    """Return what ``receipt.json`` holds: recipe, versions, and per layer its shape and numerical rank."""
    recipe = update.recipe
    content: dict[str, Any] = {"format": 1, "base_model": update.base_model}
    if recipe is not None:
        content |= {f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe)}
    content["versions"] = {"python": platform.python_version(), "nscmerge": nscmerge.__version__}
    content["versions"] |= {name: _version(name) for name in ("torch", "peft", "transformers", "safetensors")}
    content["layers"] = {name: _layer(name, update) for name in sorted(update.layers)}
    content["dense"] = {name: list(update.dense[name].shape) for name in sorted(update.dense)}
    content["per_task"] = sorted(update.per_task)
    return content


def _layer(name: str, update: Update) -> dict[str, Any]:
    """One layer's line: shape, kind, and for low-rank ones the stored and the numerical rank."""
    weight, kind = update.layers[name], update.kinds.get(name)
    line: dict[str, Any] = {"kind": asdict(kind) if kind else {"name": "linear", "shape": []}}
    if isinstance(weight, LowRank):
        line |= {"shape": [weight.d_out, weight.d_in], "rank": weight.rank, "numerical_rank": numerical_rank(weight)}
    else:
        line |= {"shape": list(weight.shape), "file": DELTA, "tensor": f"{name}.weight"}
    return line


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; a tensor (a given mask) as its shape, dtype and hash."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256_as_fp32": digest}
    if isinstance(value, Input):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def read_update(folder: Path) -> Update:
    """Return the update that a folder holds; see :func:`nscmerge.update.load_update`."""
    if not folder.is_dir():
        raise AdapterError(f"merge folder {folder} is not there. Check the path.")
    adapter = read_folder(folder, folder.name, str(folder))
    if not (folder / RECEIPT).is_file():
        return Update(adapter.layers, adapter.dense, adapter.base_model, kinds=adapter.kinds)
    try:
        content = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        lines: dict[str, Any] = content["layers"]
        kinds = {
            n: Kind(k["name"], tuple(k["shape"]))
            for n, line in lines.items()
            if (k := line["kind"])["name"] != "linear"
        }
        layers, dense = _split(adapter, lines)
        per_task: dict[str, Mapping[str, LowRank | Tensor]] = {}
        for task in content.get("per_task", []):
            parts = _split(read_folder(folder / TASKS / task, task, str(folder / TASKS / task)), lines)
            per_task[task] = {**parts[0], **parts[1]}
        recipe = _recipe(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{folder / RECEIPT} is damaged ({type(error).__name__}: {error}). Copy the merge folder again."
        ) from error
    base = content.get("base_model")
    return Update(layers, dense, base, per_task, recipe, {**kinds, **adapter.kinds})


def _split(
    adapter: Adapter, lines: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, LowRank | Tensor], dict[str, Tensor]]:
    """Return (layers, dense) of a folder, with the deltas of dense layers put back among the layers."""
    dense = dict(adapter.dense)
    layers: dict[str, LowRank | Tensor] = dict(adapter.layers)
    for name, line in lines.items():
        if name not in layers and f"{name}.weight" in dense:
            layers[name] = dense.pop(f"{name}.weight").reshape(line["shape"])
    return {name: layers[name] for name in sorted(layers)}, dense


def _recipe(content: Mapping[str, Any]) -> Recipe | None:
    if "method" not in content:
        return None
    known = {f.name: content[f.name] for f in fields(Recipe) if f.name in content}
    return Recipe(**{**known, "inputs": tuple(Input(**entry) for entry in content.get("inputs", []))})
