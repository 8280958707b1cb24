"""Adapters: read from any PEFT LoRA folder or hub id, held as factors per layer, written back as a PEFT folder.

No base model is loaded to read or to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from nscmerge.adapter_files import (
    CONFIG,
    DELTA_STEM,
    HEAD,
    HUB_FILES,
    find_deltas,
    find_weights,
    hash_weights,
    read_tensors,
    write_tensors,
)
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.folders import new_folder
from nscmerge.lazy import Lazy
from nscmerge.naming import nearest
from nscmerge.peft_config import make_config, read_config
from nscmerge.peft_format import Kind, bias_mode, check_tensor, encode, fold, parse
from nscmerge.tensor_files import ShardWriter, open_tensors

#: Modules that are a task's own head when they stand in modules_to_save: kept apart and never merged.
HEADS = ("score", "classifier", "qa_outputs", "classification_head")


@dataclass(frozen=True, eq=False)
class Adapter:
    """One task's update of a base model: low-rank per layer, plus whole tensors where it has any.

    Args:
        layers: Factors by dotted module name in the base model.
        base_model: Hub id or path of the base model, None if unknown.
        dense: Deltas D = W - W0 by tensor name (``projector.bias``).
        head: Tensors of the task's own head, by tensor name; never merged.
        name: The task, used in messages, receipts and per-task results.
        saved: Whole tensors W by tensor name as PEFT stores them; :meth:`on_base` turns them into ``dense``.
        kinds: Layers that are embeddings or convolutions; all others are linear.
        modules_to_save: Modules that PEFT has to swap in whole: those of ``saved`` and of heads that came with PEFT.
        linear: For full checkpoints: names of the modules behind ``dense`` that are ``nn.Linear``.
        source: Folder or hub id that it came from, None if made in memory.
        sha256: Hash of its weight file (of the list of shard hashes if sharded), None if made in memory.

    Raises:
        AdapterError: A layer is not a :class:`LowRank`.
    """

    layers: Mapping[str, LowRank] = field(default_factory=dict)
    base_model: str | None = None
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "adapter"
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    linear: Sequence[str] = ()
    source: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        for layer, factors in self.layers.items():
            if not isinstance(factors, LowRank):
                raise AdapterError(
                    f"adapter '{self.name}', layer '{layer}': got {type(factors).__name__}; expected LowRank(A, B, s). "
                    "Dense deltas go into dense={tensor name: delta}."
                )

    def on_base(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return the same adapter with every whole tensor W of ``saved`` turned into its delta W - W0, in fp32.

        Args:
            tensors: The base model's tensors W0 by name; more than needed is fine.

        Raises:
            AdapterError: The base has no such tensor, or one of another shape.
        """
        dense = dict(self.dense)
        for name, tensor in self.saved.items():
            if name not in tensors:
                raise AdapterError(
                    f"adapter '{self.name}': the base model has no tensor '{name}'{nearest(name, tensors)}. Give the "
                    "tensors of the model class that the adapter was trained on."
                )
            if tensors[name].shape != tensor.shape:
                raise AdapterError(
                    f"adapter '{self.name}': tensor '{name}' is {tuple(tensor.shape)}, the base model's "
                    f"{tuple(tensors[name].shape)}; a resized tensor has no delta. Leave it out, or resize the base."
                )
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            dense[name] = tensor.to(dtype) - tensors[name].to(tensor.device, dtype)
        modules = [m for m in self.modules_to_save if any(n.startswith(f"{m}.") for n in self.head)]
        return replace(self, dense=dense, saved={}, modules_to_save=modules)


def load_adapter(path_or_hub_id: str | Path, *, name: str | None = None, revision: str | None = None) -> Adapter:
    """Return a PEFT LoRA adapter, read from its tensors in their stored dtype.

    Args:
        path_or_hub_id: A folder with ``adapter_config.json`` and safetensors weights (one file or shards with an
            index), or a hub id, of which only such files are downloaded.
        name: Name of the task; the folder's or repository's own name if None.
        revision: Branch, tag or commit, for a hub id.

    Raises:
        AdapterError: Nothing is there; or something that is not plain LoRA, incomplete, damaged, NaN, or all zero. The
            message names adapter, layer or file, and the way out.
    """
    folder = local_folder(path_or_hub_id, revision)
    name = name or Path(path_or_hub_id).absolute().name
    adapter = read_folder(folder, name, str(path_or_hub_id))
    if adapter.layers and not any(_is_nonzero(layer) for layer in adapter.layers.values()):
        raise AdapterError(
            f"adapter '{name}' ({path_or_hub_id}): all {len(adapter.layers)} layers are zero updates (B or alpha is "
            "0); it was never trained, or its weights were not gathered when saved. Leave it out or save it again.",
            "zero-update",
        )
    return adapter


def local_folder(path_or_hub_id: str | Path, revision: str | None = None, patterns: Sequence[str] = HUB_FILES) -> Path:
    """Return the folder itself, or the local snapshot of a hub repository: nothing but the files of some patterns.

    Raises:
        AdapterError: Neither such a folder nor a repository that can be read now.
    """
    if (folder := Path(path_or_hub_id)).is_dir():
        return folder
    hub_id = str(path_or_hub_id)
    both = f"'{hub_id}' is neither a folder on this machine nor a hub id that can be read now"
    if Path(hub_id).is_file():
        raise AdapterError(f"'{hub_id}' is a file; expected the folder that holds it and its config.", "not-found")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.startswith("."):
        raise AdapterError(f"{both} (hub ids look like 'owner/name'). Check the path.", "not-found")
    # Imported here: the hub client costs half a second that a local folder does not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(
            f"{both} ({type(error).__name__}: {reason}). Check the path; for a hub id check its spelling, the network "
            "and your login, or download it elsewhere and give the folder.",
            "not-found",
        ) from error


def read_folder(folder: Path, name: str, source: str) -> Adapter:
    """Return the adapter of a local folder, all-zero or not; else as :func:`load_adapter`."""
    who = f"adapter '{name}' ({source})"
    deltas = find_deltas(folder, who)
    dense = _checked(open_tensors(deltas, who), who)
    head = read_tensors([folder / HEAD], who) if (folder / HEAD).is_file() else {}
    for key, tensor in head.items():
        check_tensor(tensor, f"{who}: tensor '{key}'")
    if not (folder / CONFIG).is_file():
        if dense:
            return Adapter(dense=dense, head=head, name=name, source=source, sha256=hash_weights(deltas))
        raise AdapterError(
            f"{who}: {CONFIG} is missing. Give the folder that PEFT's save_pretrained wrote.", "config-missing"
        )
    config = read_config(folder / CONFIG, who)
    files = find_weights(folder, who)
    parsed = parse(read_tensors(files, who), config, who)
    heads = {m for m in parsed.modules if _is_head(m, config.get("modules_to_save") or ())}
    saved = dict(parsed.saved)
    for key in sorted(saved):
        if any(key.startswith(f"{module}.") for module in heads):
            tensor = saved.pop(key)
            if key in head and not torch.equal(head[key], tensor):
                raise AdapterError(
                    f"{who}: '{key}' differs between {HEAD} and the weights. Delete the wrong one.", "two-heads"
                )
            head[key] = tensor
    base = config.get("base_model_name_or_path") or None
    return Adapter(
        parsed.layers, base, dense, head, name, saved, parsed.kinds, sorted(parsed.modules), (), source,
        hash_weights([*files, *deltas]),
    )  # fmt: skip


def _checked(tensors: Mapping[str, Tensor], who: str) -> Lazy[Tensor]:
    """Return the same tensors, each checked when it is read: a dense merge may not fit in memory at once."""

    def read(name: str) -> Tensor:
        check_tensor(tensor := tensors[name], f"{who}: tensor '{name}'")
        return tensor

    return Lazy(list(tensors), read)


def _is_head(module: str, modules_to_save: Sequence[str]) -> bool:
    """True if the module, or the entry of modules_to_save that it was saved for, is named like a head."""
    entries = [entry for entry in modules_to_save if module.endswith(entry)]
    return any(entry.rpartition(".")[2] in HEADS for entry in [module, *entries])


def _is_nonzero(layer: LowRank) -> bool:
    return bool(layer.A.any()) and bool(layer.B.any()) and bool(layer.dense().any())


def save_adapter(adapter: Adapter, folder: str | Path) -> Path:
    """Write ``adapter`` as a new PEFT folder and return its path; PEFT loads the same function from it.

    alpha = rank and rsLoRA off: the scaling is folded into B once. Heads go to ``head.safetensors``, those that came
    with PEFT also into the adapter itself; dense deltas, which PEFT cannot hold, to ``delta.safetensors`` in fp32.

    Raises:
        OutputExistsError: ``folder`` is there already.
        AdapterError: There is nothing to write, or what was written does not read back equal.
    """
    with new_folder(folder) as partial:
        write_adapter(adapter, partial)
    return Path(folder)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files of ``adapter`` into an existing folder, read them back and compare; see :func:`save_adapter`."""
    who = f"adapter '{adapter.name}'"
    if not adapter.layers and (adapter.saved or not adapter.dense):
        raise AdapterError(f"{who}: it has no low-rank layer, and a PEFT LoRA folder needs one. Nothing was written.")
    layers = {name: fold(adapter.layers[name]) for name in sorted(adapter.layers)}
    with_peft = tuple(f"{module}." for module in adapter.modules_to_save)
    whole = {**adapter.saved, **{n: t for n, t in adapter.head.items() if n.startswith(with_peft)}}
    if layers:
        loose = [name for name in whole if not name.startswith(with_peft)]
        ranks = {name: layer.rank for name, layer in layers.items()}
        config = make_config(ranks, adapter.base_model, adapter.modules_to_save, bias_mode(layers, loose))
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder / "adapter_model.safetensors", encode(layers, adapter.kinds, whole))
    dense = Lazy(sorted(adapter.dense), lambda name: adapter.dense[name].float())
    with ShardWriter(folder, DELTA_STEM, list(dense)) as writer:
        for name in dense:
            writer.add(name, dense[name])
    if adapter.head:
        write_tensors(folder / HEAD, adapter.head)
    _check_equal(replace(adapter, layers=layers, dense=dense), read_folder(folder, adapter.name, str(folder)), who)


def _check_equal(written: Adapter, read: Adapter, who: str) -> None:
    """Raise unless the folder holds what was meant: same layers and scale, same whole tensors, same kinds."""
    same = set(written.layers) == set(read.layers) and dict(written.kinds) == dict(read.kinds)
    for name, layer in written.layers.items() if same else ():
        got = read.layers[name]
        same &= got.scaling == layer.scaling and torch.equal(got.A, layer.A.cpu()) and torch.equal(got.B, layer.B.cpu())
    for group in ("dense", "saved", "head"):
        before, after = getattr(written, group), getattr(read, group)
        same &= set(before) == set(after) and all(torch.equal(t.cpu(), after[n]) for n, t in before.items())
    if not same:
        raise AdapterError(
            f"{who}: what was written does not read back equal, so nothing was kept. Check that layer names are the "
            "base model's dotted names and that saved and head tensors lie in modules_to_save."
        )
