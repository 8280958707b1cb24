"""Fold a merge into its base model: a full checkpoint, written tensor by tensor, that any loader takes for a model."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from nscmerge.adapter_files import hash_weights
from nscmerge.base_files import BaseFiles, Stored, find_base, find_tensor, same_place
from nscmerge.blueprint import Blueprint, read_blueprint
from nscmerge.card import checkpoint_card
from nscmerge.errors import AdapterError, ConfigError, MethodError
from nscmerge.factors import LowRank
from nscmerge.folders import check_absent, new_folder
from nscmerge.memory import peak_memory
from nscmerge.naming import unknown
from nscmerge.precision import Audit, Loss
from nscmerge.progress import Watch, quiet
from nscmerge.receipts import receipt, write_receipt
from nscmerge.tensor_files import TensorWriter, opened
from nscmerge.update import Update

#: What a checkpoint may be stored in, by name.
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: Bytes of a tensor that are worked on at a time: what fits into caches is done in half the time.
_BLOCK = 1 << 22
#: (rows of the base tensor) -> the same rows of the update.
Rows = Callable[[slice], Tensor]


def fold_into(
    update: Update,
    base: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    task: str | None = None,
    watch: Watch = quiet,
) -> Audit:
    """Write a new checkpoint folder, W = W0 + delta for every tensor, and return what rounding took from the update.

    Same files, shards, index and side files (configuration, tokenizer, ...) as the base. Each sum is formed in fp32 and
    cast once. Memory is one layer of the merge and some megabytes of the base, whatever the model's size.

    Args:
        update: A merge; its layers are found by name, with or without the prefix that the task model adds.
        base: The base model: folder, hub id, or ``package:NAME/FOLDER``; safetensors, not quantised.
        folder: Folder to make.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64`` for all of the model; None keeps each tensor's own.
        task: Whose weights, for a merge that keeps weights per task.
        watch: Wraps the loop over the tensors of a file, to show progress.

    Raises:
        OutputExistsError: ``folder`` is there already.
        ConfigError: ``dtype`` is none of those.
        MethodError: The merge keeps weights per task and none is named, or the other way round.
        AdapterError: The base cannot be read, lacks a tensor, has one of another shape or a quantised one, shares it
            with another module, or the sum overflows ``dtype``.
    """
    check_absent(folder)
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(unknown("dtype", dtype, FLOATS))
    start = time.perf_counter()
    files = find_base(base)
    plan = _plan(update, task, files, read_blueprint(files.folder))
    losses: dict[str, Loss] = {}
    with new_folder(folder) as target:
        for path in files.files:
            _write_file(path, target / path.name, files, plan, dtype, losses, watch)
        _copy_side_files(files, target, dtype)
        audit = Audit(dict(sorted(losses.items())), {n: _stored_as(files.tensors[n], dtype) for n in losses})
        content = receipt(update) | {
            "folded_into": {"source": str(base), "sha256": hash_weights(files.files)},
            "task": task,
            "precision": audit.as_dict(),
            "writing": {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory()},
        }
        write_receipt(content, target)
        (target / "README.md").write_text(checkpoint_card(update, audit, task), encoding="utf-8")
    return audit


@dataclass(frozen=True)
class _Part:
    """What goes into one tensor of the base.

    Args:
        name: Layer or whole tensor of the merge.
        tensor: Name of the tensor that it means.
        weight: Its factors or dense delta, computed or read when called.
        transposed: The base stores (d_in, d_out).
    """

    name: str
    tensor: str
    weight: Callable[[], LowRank | Tensor]
    transposed: bool


def _plan(update: Update, task: str | None, files: BaseFiles, blueprint: Blueprint) -> dict[str, list[_Part]]:
    """Return what goes into which tensor of the base; nothing is computed yet."""
    if update.per_task and task is None:
        raise MethodError(
            f"this merge keeps weights per task ({', '.join(sorted(update.per_task))}), and a checkpoint holds those "
            "of one task. Name the task, and write one checkpoint for each."
        )
    update.check_task(task)
    own = update.per_task[task] if task is not None else ()
    whole = dict.fromkeys([*update.dense, *(name for name in own if name not in update.layers)])
    plan: dict[str, list[_Part]] = {}
    for name in [*update.layers, *whole]:
        layer = name in update.layers
        tensor = f"{name}.weight" if layer else name
        found = find_tensor(tensor, files.tensors, f"'{name}'")
        _check_alone(name, found, blueprint)
        transposed = layer and any(same_place(name, module) for module in blueprint.transposed)
        parts = plan.setdefault(found, [])
        if parts and parts[0].tensor != tensor:
            raise AdapterError(
                f"'{parts[0].name}' and '{name}' both mean '{found}' of the base checkpoint; one must go."
            )
        parts.append(_Part(name, tensor, partial(update.weight, name, task), transposed))
    if not plan:
        raise AdapterError("this merge has neither layers nor whole tensors; there is nothing to fold into a base.")
    return plan


def _check_alone(name: str, tensor: str, blueprint: Blueprint) -> None:
    """Raise if the tensor is shared: the update of one module would become one of another."""
    for group in blueprint.tied:
        if any(same_place(tensor, other) for other in group):
            raise AdapterError(
                f"'{name}': the base model uses {' and '.join(map(repr, group))} as one parameter; folded into it, the "
                "update of one would change the other. Keep this merge as an adapter, or untie the base first (a "
                "tensor under each name, and tie_word_embeddings false in config.json)."
            )


def _write_file(
    source: Path,
    target: Path,
    files: BaseFiles,
    plan: Mapping[str, Sequence[_Part]],
    dtype: str | None,
    losses: dict[str, Loss],
    watch: Watch,
) -> None:
    """Write one file of the base again, with the updates added; note in ``losses`` what rounding took."""
    own = {name: stored for name, stored in files.tensors.items() if stored.file == source}
    with opened(source, str(source)) as file:
        metadata = file.metadata() or {"format": "pt"}
    # Wide ones first, as the library does, so that every tensor is aligned to its own width.
    names = sorted(own, key=lambda name: (-_stored_as(own[name], dtype).itemsize, name))
    with TensorWriter(target, names, metadata) as writer:
        for name in watch(names, f"writing {target.name}"):
            stored, out = own[name], _stored_as(own[name], dtype)
            blocks = _read(name, stored)
            if name in plan:
                loss = losses[name] = Loss()
                blocks = _added(blocks, _update_rows(name, stored, plan[name]), name, stored, out, loss)
            writer.add(name, out, stored.shape, (block for _, block in blocks))


def _stored_as(stored: Stored, dtype: str | None) -> torch.dtype:
    """The output dtype of a tensor: integers and quantised ones are never converted."""
    return FLOATS[dtype] if dtype is not None and stored.dtype in FLOATS.values() else stored.dtype


def _read(name: str, stored: Stored) -> Iterator[tuple[slice, Tensor]]:
    """Yield a tensor of the base by blocks of rows, opening the file anew for each, as mapped pages stay in memory."""
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, _BLOCK * rows // max(stored.nbytes, 1))
    for start in range(0, rows, step) if step < rows else ():
        with opened(stored.file, str(stored.file)) as file:
            yield (part := slice(start, start + step)), file.get_slice(name)[part]
    if step >= rows:
        with opened(stored.file, str(stored.file)) as file:
            yield slice(None), file.get_tensor(name)


def _added(
    blocks: Iterator[tuple[slice, Tensor]], update: Rows, name: str, stored: Stored, dtype: torch.dtype, loss: Loss
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the same blocks with the update added, in the output dtype, and count what rounding took."""
    wide = torch.promote_types(torch.float32, stored.dtype)
    for part, block in blocks:
        delta = update(part).to(wide).reshape(block.shape)
        exact = block.to(wide) + delta
        rounded = exact.to(dtype)
        if bool((rounded.isfinite() != exact.isfinite()).any()):
            raise AdapterError(f"'{name}': base plus update overflows {dtype}. Store bfloat16 or float32 instead.")
        loss.add(block.to(dtype), delta, rounded)
        yield part, rounded


def _update_rows(name: str, stored: Stored, parts: Sequence[_Part]) -> Rows:
    """Return a function that gives rows of the summed update, flattened to a matrix; shapes are checked here.

    Raises:
        AdapterError: The tensor has another shape than the update, or is quantised.
    """
    if stored.dtype not in FLOATS.values():
        raise AdapterError(
            f"'{name}' is stored as {stored.dtype} in the base checkpoint; a quantised weight cannot take an update. "
            "Give the checkpoint before quantisation."
        )
    matrix = (stored.shape[0] if stored.shape else 1, math.prod(stored.shape[1:]))
    terms: list[Rows] = []
    for part in parts:
        weight = part.weight()
        if isinstance(weight, LowRank):
            term, got = _product(weight, part.transposed)
        else:
            dense = weight.T if part.transposed else weight
            got = tuple(dense.shape)
            term = partial(_rows_of, dense.reshape(got[0] if got else 1, -1))
        # The layer of a convolution is its kernel, flattened behind the output channels.
        if got not in (stored.shape, matrix):
            raise AdapterError(
                f"'{part.name}': the update is {got}, '{name}' of the base checkpoint {stored.shape}; the merge "
                "belongs to another base model."
            )
        terms.append(term)
    return lambda rows: reduce(torch.add, (term(rows) for term in terms))


def _product(layer: LowRank, transposed: bool) -> tuple[Rows, tuple[int, ...]]:
    """Return the rows of a product, formed for each block alone, and its shape."""
    dtype = torch.promote_types(torch.promote_types(layer.A.dtype, layer.B.dtype), torch.float32)
    left, right = layer.scaling * layer.B.to(dtype), layer.A.to(dtype)
    if transposed:
        left, right = right.T, left.T
    return lambda rows: left[rows] @ right, (len(left), right.shape[1])


def _rows_of(matrix: Tensor, rows: slice) -> Tensor:
    return matrix[rows]


def _copy_side_files(files: BaseFiles, folder: Path, dtype: str | None) -> None:
    """Copy what a loader needs beside the weights, with the index's size and the config's dtype as they are now."""
    for path in files.side_files():
        target = folder / path.relative_to(files.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        # transformers wrote torch_dtype before version 5 and writes dtype since.
        content |= {key: dtype for key in ("dtype", "torch_dtype") if key in content} or {"torch_dtype": dtype}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if files.index is not None:
        content = json.loads(files.index.read_text(encoding="utf-8"))
        size = sum(_stored_as(s, dtype).itemsize * math.prod(s.shape) for s in files.tensors.values())
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
        (folder / files.index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
