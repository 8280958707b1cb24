"""A whole fine-tuned checkpoint as an expert, from its files: no model class, and one tensor in memory at a time."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nscmerge.adapter_files import CONFIG, DELTA, DELTA_INDEX, hash_weights
from nscmerge.adapters import HEADS, Adapter
from nscmerge.base_files import BaseFiles, find_base, find_tensor
from nscmerge.errors import AdapterError, TargetError
from nscmerge.lazy import Lazy
from nscmerge.naming import unknown
from nscmerge.tensor_files import opened


def is_checkpoint(folder: str | Path) -> bool:
    """True for a local folder of whole weights: safetensors, and neither an adapter's config nor a merge's deltas."""
    path = Path(folder)
    adapters = (CONFIG, DELTA, DELTA_INDEX)
    return path.is_dir() and any(path.glob("*.safetensors")) and not any((path / name).is_file() for name in adapters)


def load_checkpoint(
    source: str | Path, base: str | Path, *, name: str | None = None, linear: Sequence[str] = ()
) -> Adapter:
    """Return the deltas theta_t - theta_0 of every float tensor of a checkpoint, in fp32, each made when asked for.

    Heads (``classifier``, ``score``, ...) that the base model lacks stay the task's own and are not merged.

    Args:
        source: Checkpoint folder or hub id, in safetensors.
        base: The same of the base model that it was fine-tuned from.
        name: Of the task; the folder's own if None.
        linear: Names or patterns (``*``, ``*fc1``) of the modules that are ``nn.Linear``: files do not say which are.

    Raises:
        AdapterError: A folder is incomplete or damaged, or the two do not belong together.
        TargetError: A pattern of ``linear`` fits no matrix.
    """
    name = name or Path(source).absolute().name
    ours, theirs = find_base(source), find_base(base)
    places: dict[str, str] = {}
    head: dict[str, Tensor] = {}
    for tensor, stored in ours.tensors.items():
        if not stored.dtype.is_floating_point:
            continue
        if tensor not in theirs.tensors and any(part in HEADS for part in tensor.split(".")):
            head[tensor] = _read(ours, tensor)
            continue
        own = find_tensor(tensor, theirs.tensors, f"checkpoint '{name}'")
        if stored.shape != theirs.tensors[own].shape:
            raise AdapterError(
                f"checkpoint '{name}' ({source}): tensor '{tensor}' is {stored.shape}, the base model's "
                f"{theirs.tensors[own].shape}; experts must be fine-tuned from the base model. Give that base."
            )
        places[tensor] = own
    dense = Lazy(sorted(places), lambda tensor: _read(ours, tensor) - _read(theirs, places[tensor]))
    shapes = {tensor: ours.tensors[tensor].shape for tensor in places}
    chosen = pick_linear(shapes, linear, f"checkpoint '{name}'")
    return Adapter(
        dense=dense, head=head, name=name, linear=chosen, source=str(source), sha256=hash_weights(ours.files)
    )


def pick_linear(shapes: Mapping[str, tuple[int, ...]], patterns: Sequence[str], who: str) -> list[str]:
    """Return the modules behind 2-D weights that fit any of some names or patterns, sorted.

    Raises:
        TargetError: A pattern fits none.
    """
    known = [n.removesuffix(".weight") for n, shape in shapes.items() if len(shape) == 2 and n.endswith(".weight")]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise TargetError(f"{who}, linear: {unknown('matrix', pattern, known)} Patterns such as '*fc1' work too.")
    return sorted(name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _read(files: BaseFiles, name: str) -> Tensor:
    with opened(files.tensors[name].file, str(files.folder)) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.to(torch.float32)
