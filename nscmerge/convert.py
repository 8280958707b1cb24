"""Published adapters in other layouts, rewritten as PEFT folders in safetensors: LLaVA's and KnOTS'.

LLaVA keeps the trained projector beside the adapter, in ``non_lora_trainables.bin``, and both under the names of its
own code; KnOTS keeps the heads of all tasks in one file, ``{task: (classes, width)}``. Such files are pickles: they are
opened with torch's restricted reader, which builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nscmerge.adapter_files import CONFIG, HUB_FILES, INDEX, LLAVA_WHOLE, WEIGHTS, indexed_files, read_tensors
from nscmerge.adapters import Adapter, load_adapter, local_folder, read_folder, save_adapter
from nscmerge.errors import AdapterError
from nscmerge.folders import check_absent
from nscmerge.naming import unknown
from nscmerge.peft_config import read_config
from nscmerge.peft_format import PREFIX, check_tensor, parse

PICKLED = "adapter_model.bin"
#: What a task with one linear layer for a head calls its weight.
HEAD_WEIGHT = "linear.weight"
#: The same weights as transformers reads them.
_IN_TRANSFORMERS = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
}
#: Names of the original LLaVA code, from the start of a name.
_LLAVA = {
    r"model\.layers\.": "model.language_model.layers.",
    r"model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    heads: str | Path | None = None,
    task: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write an adapter of another layout as a new PEFT folder, and return its path.

    Args:
        source: Folder or hub id: LLaVA's layout, or a PEFT adapter, pickled or not.
        output: Folder to make.
        heads: File of heads by task (KnOTS), a folder or hub id that holds ``heads.pt``, or None for none but its own.
        task: Whose head of ``heads`` is the adapter's.
        base_model: What the folder names as its base; None takes the adapter's own, for LLaVA its twin in transformers.

    Raises:
        OutputExistsError: ``output`` is there already.
        AdapterError: A file is missing or damaged, holds more than tensors, or has no head of that task.
    """
    check_absent(output)
    folder = local_folder(source, patterns=(*HUB_FILES, PICKLED))
    who = f"adapter '{folder.name}' ({source})"
    adapter = _read(folder, who)
    head = dict(adapter.head)
    if heads is not None:
        head = {HEAD_WEIGHT: _head(heads, task)}
    elif len(head) == 1 and next(iter(head.values())).ndim == 2:
        head = {HEAD_WEIGHT: next(iter(head.values()))}
    modules = sorted({name.rpartition(".")[0] for name in adapter.saved})
    base = base_model or _IN_TRANSFORMERS.get(adapter.base_model or "", adapter.base_model)
    written = save_adapter(
        Adapter(
            layers=adapter.layers, base_model=base, dense=adapter.dense, head=head, name=adapter.name,
            saved=adapter.saved, kinds=adapter.kinds, modules_to_save=modules,
        ),
        output,
    )  # fmt: skip
    load_adapter(written)  # a folder that we cannot read is no result
    return written


def _read(folder: Path, who: str) -> Adapter:
    """Return what a folder holds, by the names of transformers."""
    whole = _tensors(folder / LLAVA_WHOLE, who) if (folder / LLAVA_WHOLE).is_file() else {}
    if not whole and ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return read_folder(folder, folder.name, str(folder))
    config = read_config(folder / CONFIG, who)
    if (folder / WEIGHTS).is_file():
        tensors = read_tensors([folder / WEIGHTS], who)
    elif (folder / INDEX).is_file():
        tensors = read_tensors(indexed_files(folder / INDEX, who), who)
    elif (folder / PICKLED).is_file():
        tensors = _tensors(folder / PICKLED, who)
    else:
        raise AdapterError(
            f"{who}: neither {WEIGHTS} nor {PICKLED} is there. Copy the whole folder.", "weights-missing"
        )
    # Copies of what LLaVA writes beside the adapter, and the name of an adapter that was not the only one.
    tensors = {k.replace(".default.", "."): t for k, t in tensors.items() if k not in whole}
    parsed = parse(tensors, config, who)
    saved = dict(parsed.saved)
    for key, tensor in whole.items():
        name = key.removeprefix(PREFIX)
        check_tensor(tensor, f"{who}: tensor '{name}' of {LLAVA_WHOLE}")
        saved[name] = tensor
    base = str(config.get("base_model_name_or_path") or "") or None
    original = any("mm_projector" in name for name in saved) or base in _IN_TRANSFORMERS
    rename = _in_transformers if original else str
    head = {name: tensor for name, tensor in saved.items() if name.partition(".")[0] in ("score", "classifier")}
    return Adapter(
        layers={rename(name): layer for name, layer in parsed.layers.items()},
        base_model=base,
        head=head,
        name=folder.name,
        saved={rename(name): tensor for name, tensor in saved.items() if name not in head},
        kinds={rename(name): kind for name, kind in parsed.kinds.items()},
    )


def _in_transformers(name: str) -> str:
    """Return what transformers calls a layer or tensor of the original LLaVA code."""
    for pattern, new in _LLAVA.items():
        name = re.sub(f"^{pattern}", new, name)
    return name


def _head(source: str | Path, task: str | None) -> Tensor:
    """Return one task's head weight, (classes, width), from a file of heads."""
    file = Path(source)
    if not file.is_file():
        file = local_folder(source, patterns=("heads.pt",)) / "heads.pt"
    heads = _load(file, f"heads '{source}'")
    if not isinstance(heads, Mapping) or task not in heads:
        known = [str(name) for name in heads] if isinstance(heads, Mapping) else []
        raise AdapterError(f"heads '{source}': {unknown('head of task', str(task), known)} Name one with --task.")
    found = heads[task]
    tensors = list(found.values()) if isinstance(found, Mapping) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].ndim != 2:
        raise AdapterError(f"heads '{source}': that of '{task}' is no single matrix; expected one (classes, width).")
    check_tensor(tensors[0], f"heads '{source}': that of '{task}'")
    return tensors[0].detach()


def _tensors(path: Path, who: str) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict."""
    content = _load(path, who)
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise AdapterError(f"{who}: {path.name} holds more than tensors by name; expected a state dict.")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _load(path: Path, who: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{who}: {path.name} holds more than tensors, which could run code when opened, and is not read "
            f"({str(error).splitlines()[0]}). Save it again where you trust it, as tensors only."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{who}: {path.name} cannot be read ({str(error).splitlines()[0]}). Copy it again."
        ) from error
