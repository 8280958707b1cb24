"""Which files make up an adapter folder, and how tensors get in and out of them: safetensors only, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nscmerge.errors import AdapterError
from nscmerge.folders import sha256_file
from nscmerge.layer_names import canonical, same_layer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
#: Where LLaVA's trainer keeps what it trained beside LoRA.
LLAVA_WHOLE = "non_lora_trainables.bin"
HEAD = "head.safetensors"
DELTA_STEM = "delta"
DELTA = f"{DELTA_STEM}.safetensors"
DELTA_INDEX = f"{DELTA}.index.json"
RECEIPT = "receipt.json"
#: All that is ever downloaded of a hub repository; LLaVA's file so that its projector is not lost in silence.
HUB_FILES = (CONFIG, "adapter_model*.safetensors", INDEX, HEAD, "delta*.safetensors", DELTA_INDEX, RECEIPT, LLAVA_WHOLE)


def find_weights(folder: Path, who: str) -> list[Path]:
    """Return the weight files of an adapter folder: the single one, or the shards that its index names, sorted.

    Raises:
        AdapterError: No safetensors weights, an index that names missing or foreign files, only a pickle, or tensors in
            LLaVA's layout beside the adapter.
    """
    if (folder / LLAVA_WHOLE).is_file():
        raise AdapterError(
            f"{who}: {LLAVA_WHOLE} beside the adapter holds its projector (LLaVA's layout), which would be lost. "
            "Rewrite it: nscmerge convert FOLDER --output NEW.",
            "pickle-only",
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return indexed_files(folder / INDEX, who)
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{who}: adapter_model.bin is a pickle, which can run code when opened, and is not read here. Rewrite it: "
            "nscmerge convert FOLDER --output NEW, which opens it as tensors only.",
            "pickle-only",
        )
    raise AdapterError(
        f"{who}: {WEIGHTS} is missing, and no {INDEX} names shards. Copy the whole adapter folder. If it was published "
        "as adapter_model.bin, as LLaVA's are: nscmerge convert ADAPTER --output NEW.",
        "weights-missing",
    )


def find_deltas(folder: Path, who: str) -> list[Path]:
    """Return the files of dense deltas in a merge folder: none, the single one, or the shards of its index, sorted.

    Raises:
        AdapterError: The index is damaged or names files that are not there.
    """
    if (folder / DELTA).is_file():
        return [folder / DELTA]
    return indexed_files(folder / DELTA_INDEX, who) if (folder / DELTA_INDEX).is_file() else []


def indexed_files(index: Path, who: str) -> list[Path]:
    """Return the shards that an index in the hub's form names, sorted.

    Raises:
        AdapterError: The index is damaged, or names missing or foreign files.
    """
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{who}: {index.name} is damaged; expected JSON with 'weight_map'. Copy it again.", "index-damaged"
        ) from error
    for name in files:
        # The index is untrusted: a name with folders in it could point anywhere.
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise AdapterError(
                f"{who}: {index.name} names {name!r}, which is not in the folder. Copy all shards.", "shard-missing"
            )
    return [index.parent / name for name in files]


def read_tensors(files: Sequence[Path], who: str) -> dict[str, Tensor]:
    """Return all tensors of some safetensors files, by key, on the CPU, in their stored dtype.

    Raises:
        AdapterError: A file is damaged, or two files hold the same key.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{who}: {path.name} cannot be read ({error}). Copy it again.", "weights-damaged"
            ) from error
        if double := sorted(set(content) & set(tensors)):
            raise AdapterError(f"{who}: key '{double[0]}' stands in two shards. Save the adapter again.", "double-key")
        tensors |= content
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file in sorted order; ``format`` in its header is what PEFT looks for."""
    # Own memory for each: views (transposes, shared heads) are refused by the format.
    content = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    save_file(content, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(0o644)  # safetensors makes files that nobody else can read; a shared adapter should not be one


def hash_weights(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the one weight file; of the lines ``<hash>  <name>`` of all shards if there are several."""
    if len(files) == 1:
        return sha256_file(files[0])
    lines = "".join(f"{sha256_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_base(source: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that a base model's safetensors file or folder has; the rest is not read.

    A name that is not there counts as the one that spells it in another way (:mod:`nscmerge.layer_names`).

    Raises:
        AdapterError: No safetensors file there, or a damaged one.
    """
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise AdapterError(f"base {source}: no safetensors file there. Give the base model's file, folder or tensors.")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                there = same_layer(file.keys())
                for name in names:
                    spelled = there.get(canonical(name), [])
                    if name in spelled or (len(spelled) == 1 and name not in tensors):
                        tensors[name] = file.get_tensor(name if name in spelled else spelled[0])
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"base {path}: cannot be read ({error}). Copy it again.") from error
    return tensors
