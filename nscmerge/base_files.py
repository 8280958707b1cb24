"""A base model's checkpoint on disk: which files it has, and which tensor an adapter's layer means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nscmerge.adapter_files import indexed_files
from nscmerge.adapters import local_folder
from nscmerge.base_model import resolve_source
from nscmerge.errors import AdapterError
from nscmerge.layer_names import canonical
from nscmerge.naming import nearest
from nscmerge.tensor_files import DTYPES, opened

#: What a loader needs beside the weights: configuration, tokenizer, custom code, templates, licences.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "LICENCE*", "NOTICE*")
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its file, dtype and shape."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class BaseFiles:
    """A checkpoint folder.

    Args:
        folder: The folder.
        files: Its weight files, sorted.
        index: The index of several shards, None for one file.
        tensors: Every tensor by name, from the headers alone.
    """

    folder: Path
    files: tuple[Path, ...]
    index: Path | None
    tensors: Mapping[str, Stored]

    def side_files(self) -> list[Path]:
        """Return the files that a loader needs beside the weights, those of sub-folders too, sorted."""
        found = {path for pattern in SIDE_FILES for path in self.folder.rglob(pattern) if path.is_file()}
        hidden = {p for p in found if any(part.startswith(".") for part in p.relative_to(self.folder).parts)}
        return sorted(p for p in found - hidden if not p.name.endswith((".index.json", "receipt.json")))


def find_base(source: str | Path) -> BaseFiles:
    """Return the checkpoint of a folder, a hub id (downloaded), or ``package:NAME/FOLDER``; no tensor is read.

    Raises:
        AdapterError: No such folder, no safetensors weights in it, several that no index joins, or damaged ones.
    """
    folder = local_folder(resolve_source(str(source)), patterns=(*SIDE_FILES, "*.safetensors"))
    who = f"base model '{source}'"
    single, indices = sorted(folder.glob("*.safetensors")), sorted(folder.glob("*.safetensors.index.json"))
    index = next((i for i in indices if i.name == f"{_WEIGHTS}.index.json"), indices[0] if indices else None)
    if (folder / _WEIGHTS).is_file():
        files, index = [folder / _WEIGHTS], None
    elif index is not None:
        files = indexed_files(index, who)
    elif len(single) == 1:
        files = single
    else:
        found = ", ".join(path.name for path in single) or "no safetensors file"
        raise AdapterError(
            f"{who}: {found} in {folder}; expected {_WEIGHTS}, or shards with {_WEIGHTS}.index.json. Weights in other "
            "formats are not read: save the model again with safe_serialization=True.",
            "weights-missing",
        )
    tensors: dict[str, Stored] = {}
    for path in files:
        with opened(path, who) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise AdapterError(f"{who}: '{name}' is stored as {header.get_dtype()}, which cannot be copied.")
                tensors[name] = Stored(path, DTYPES[header.get_dtype()], tuple(header.get_shape()))
    return BaseFiles(folder, tuple(files), index, tensors)


def same_place(a: str, b: str) -> bool:
    """Whether two dotted names are equal, or one is the other without its first parts.

    A checkpoint saved from the bare encoder lacks the prefix (``model.``, ``transformer.``) that the encoder has inside
    a task model.
    """
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def find_tensor(name: str, tensors: Iterable[str], owner: str) -> str:
    """Return the checkpoint's name of a tensor: the same, or the only one that differs by leading parts alone.

    Args:
        name: Tensor name as the adapter has it, such as ``model.layers.0.self_attn.q_proj.weight``; spelled as any
            wrapping of the model would (:mod:`nscmerge.layer_names`).
        tensors: Names in the checkpoint.
        owner: What the name belongs to, for messages.

    Raises:
        AdapterError: None, or several.
    """
    tensors = list(tensors)
    found = [name] if name in tensors else [t for t in tensors if same_place(name, t)]
    if not found:
        form = canonical(name)
        found = [tensor for tensor in tensors if canonical(tensor) == form]
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(
            f"{owner}: '{name}' could be {' or '.join(map(repr, sorted(found)[:3]))} in the base checkpoint. Give the "
            "checkpoint of the model class that the adapters were trained on."
        )
    raise AdapterError(
        f"{owner}: the base checkpoint has no tensor '{name}'{nearest(name, tensors)}. Adapter and base model must "
        "belong together; a head that shares the embedding's weight has no tensor of its own to fold into."
    )
