"""Merge folders: weights, and beside them where they came from (``receipt.json``) and how to use them (card)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nscmerge.adapter_files import DELTA_STEM, RECEIPT
from nscmerge.adapters import Adapter, read_folder, write_adapter
from nscmerge.card import card
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.lazy import Lazy
from nscmerge.masked import MaskedWeights
from nscmerge.memory import peak_memory
from nscmerge.peft_format import Kind, check_tensor
from nscmerge.progress import Watch, quiet
from nscmerge.receipts import layer_line, receipt, recipe_of, write_receipt
from nscmerge.tensor_files import ShardWriter
from nscmerge.update import Update, Weights

#: Sub-folder with one adapter per task, where a method keeps per-task weights.
TASKS = "tasks"


def write_update(update: Update, folder: Path, watch: Watch = quiet) -> None:
    """Write weights, receipt and card of ``update`` into an existing folder.

    Dense layers go from where they are computed straight to the disk, one at a time.
    """
    start = time.perf_counter()
    lines, shapes = _write_weights(update.layers, update.dense, update, folder, "merged", watch)
    masked = {}
    for task, weights in update.per_task.items():
        if not re.fullmatch(r"\w[\w. -]*", task):
            raise AdapterError(f"task name {task!r} cannot be a folder name; use letters, digits, '.', '_' and '-'.")
        (folder / TASKS / task).mkdir(parents=True)
        if isinstance(weights, MaskedWeights):
            own = Adapter(weights.layers, update.base_model, weights.whole, name=task, kinds=_kinds(weights, update))
            write_adapter(own, folder / TASKS / task)
            masked[task] = {"rescaler": weights.rescaler, "flipped": weights.flipped}
        else:
            layers = Lazy([n for n in weights if n in update.layers], weights.__getitem__)
            dense = Lazy([n for n in weights if n not in update.layers], partial(_tensor, weights))
            _write_weights(layers, dense, update, folder / TASKS / task, task, watch)
    content = receipt(update) | {"layers": lines}
    content |= {"dense": shapes, "per_task": sorted(update.per_task), "masked": masked}
    # Dense layers are computed while they are written, so this is part of what the merge costs.
    content["writing"] = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory()}
    write_receipt(content, folder)
    (folder / "README.md").write_text(card(update, lines), encoding="utf-8")


def _write_weights(
    layers: Weights, dense: Mapping[str, Tensor], update: Update, folder: Path, name: str, watch: Watch
) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """Write factors as a PEFT adapter and the rest as deltas, dense layers among them as ``<layer>.weight``.

    Returns:
        The receipt's lines of all layers, and the shapes of whole tensors.
    """
    low: dict[str, LowRank] = {}
    lines, shapes = {}, {}
    with ShardWriter(folder, DELTA_STEM, [*(f"{layer}.weight" for layer in layers), *dense]) as writer:
        for layer in watch(sorted(layers), "writing"):
            weight, kind = layers[layer], update.kinds.get(layer)
            if isinstance(weight, LowRank):
                low[layer] = weight
            else:
                check_tensor(weight, f"{name}, layer '{layer}'")
                shape = (len(weight), *kind.shape) if kind and kind.shape else weight.shape
                writer.add(f"{layer}.weight", weight.reshape(shape).float())
            lines[layer] = layer_line(layer, weight, kind)
        for tensor in sorted(dense):
            check_tensor(delta := dense[tensor], f"{name}, tensor '{tensor}'")
            writer.add(tensor, delta.float())
            shapes[tensor] = list(delta.shape)
        if low or not (lines or shapes):
            # Reads back what is in the folder, so it comes before the deltas get their names.
            write_adapter(Adapter(low, update.base_model, name=name, kinds=_kinds(low, update)), folder)
    return lines, shapes


def _kinds(layers: Mapping[str, Any], update: Update) -> dict[str, Kind]:
    return {name: kind for name, kind in update.kinds.items() if name in layers}


def _tensor(weights: Weights, name: str) -> Tensor:
    if isinstance(weight := weights[name], Tensor):
        return weight
    raise AdapterError(f"'{name}' has factors for one task, but is no layer of the merge; expected one of its layers.")


def read_update(folder: Path) -> Update:
    """Return the update that a folder holds; see :func:`nscmerge.update.load_update`."""
    if not folder.is_dir():
        raise AdapterError(f"merge folder {folder} is not there. Check the path.")
    adapter = read_folder(folder, folder.name, str(folder))
    if not (folder / RECEIPT).is_file():
        return Update(adapter.layers, adapter.dense, adapter.base_model, kinds=adapter.kinds)
    try:
        content = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        shapes = {n: tuple(line["shape"]) for n, line in content["layers"].items()}
        kinds = {
            n: Kind(k["name"], tuple(k["shape"]))
            for n, line in content["layers"].items()
            if (k := line["kind"])["name"] != "linear"
        }
        layers, dense = _split(adapter, shapes)
        masked = {t: (float(m["rescaler"]), bool(m["flipped"])) for t, m in content.get("masked", {}).items()}
        tasks = list(content.get("per_task", []))
        recipe = recipe_of(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{folder / RECEIPT} is damaged ({type(error).__name__}: {error}). Copy the merge folder again."
        ) from error
    per_task: dict[str, Weights] = {}
    for task in tasks:
        own = read_folder(folder / TASKS / task, task, str(folder / TASKS / task))
        if task in masked:
            per_task[task] = MaskedWeights(_joined(layers, dense), own.layers, own.dense, *masked[task])
        else:
            per_task[task] = _joined(*_split(own, shapes))
    base = content.get("base_model")
    return Update(layers, dense, base, per_task, recipe, {**kinds, **adapter.kinds})


def _split(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Weights, Mapping[str, Tensor]]:
    """Return (layers, dense) of a folder, with the deltas of dense layers put back among the layers; none is read."""
    deltas = [n for n in shapes if n not in adapter.layers and f"{n}.weight" in adapter.dense]

    def layer(name: str) -> LowRank | Tensor:
        if name in adapter.layers:
            return adapter.layers[name]
        return adapter.dense[f"{name}.weight"].reshape(shapes[name])

    rest = [n for n in adapter.dense if n not in {f"{layer}.weight" for layer in deltas}]
    return Lazy(sorted([*adapter.layers, *deltas]), layer), Lazy(rest, adapter.dense.__getitem__)


def _joined(layers: Weights, dense: Mapping[str, Tensor]) -> Lazy[Any]:
    return Lazy([*layers, *dense], lambda name: layers[name] if name in layers else dense[name])
