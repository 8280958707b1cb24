"""A state of a continual merge as the files of one directory: every bit of it, and a hash of every file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nscmerge
from nscmerge.adapter_files import find_deltas, indexed_files
from nscmerge.continual.state import Absorbed, State, Weight
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.folders import sha256_file
from nscmerge.lazy import Lazy
from nscmerge.peft_format import Kind
from nscmerge.progress import Watch, quiet
from nscmerge.tensor_files import ShardWriter, open_tensors
from nscmerge.update import Update

#: Version of the layout below. A change that older code cannot read raises it.
FORMAT = 1
STATE = "state.json"
STEM = "state"
#: Hashes of all files, in the form that ``sha256sum -c`` reads.
SUMS = "SHA256SUMS"

#: By layer or tensor name, numbers about one step; see :mod:`nscmerge.continual.measures`.
Measures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Record:
    """What a directory holds.

    Args:
        state: The state; its tensors are read when asked for.
        measures: One entry per step, in order.
    """

    state: State
    measures: Sequence[Measures]


def write_record(record: Record, update: Update, folder: Path, watch: Watch = quiet) -> None:
    """Write a state into an existing directory, beside its merge: adapter or deltas, receipt, card.

    Dense fp32 tensors that stand bit for bit in the merge's ``delta.safetensors`` are not written twice.

    Args:
        record: State and measures.
        update: The state's update, from the method.
        folder: Empty directory.
        watch: Wraps the loops over names.
    """
    from nscmerge.export import write_update

    write_update(update, folder, watch)
    state = record.state
    deltas = open_tensors(find_deltas(folder, str(folder)), str(folder))
    names = [*(f"{part}/{name}" for name in state.merged for part in "ABM"), *(f"T/{name}" for name in state.tensors)]
    forms: dict[str, dict[str, Any]] = {}
    extra: dict[str, bool] = {}
    with ShardWriter(folder, STEM, names) as writer:
        for name in watch(sorted(state.merged), "saving"):
            forms[name] = _write_weight(writer, name, state.merged[name], deltas, name in state.layers)
        for name in sorted(state.tensors):
            extra[name] = _add(writer, f"T/{name}", state.tensors[name])
    content = {
        "format": FORMAT,
        "nscmerge": nscmerge.__version__,
        "method": state.method,
        "variant": state.variant,
        "options": dict(state.options),
        "t": state.t,
        "base_model": state.base_model,
        "layers": list(state.layers),
        "linear": list(state.linear),
        "shapes": {name: list(shape) for name, shape in state.shapes.items()},
        "kinds": {name: asdict(kind) for name, kind in state.kinds.items()},
        "scalars": dict(state.scalars),
        "merged": forms,
        "tensors": extra,
        "absorbed": [asdict(one) for one in state.absorbed],
        "measures": list(record.measures),
    }
    (folder / STATE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / SUMS).write_text(sums, encoding="utf-8")


def read_record(folder: Path, who: str) -> Record:
    """Return what :func:`write_record` wrote, after its hashes were checked.

    Args:
        folder: The directory.
        who: What it belongs to, for messages.

    Raises:
        AdapterError: Written by a newer version; incomplete or damaged.
    """
    _check_format(folder, who)
    check_sums(folder, who)
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = open_tensors(_files(folder, who), who)
        deltas = open_tensors(find_deltas(folder, who), who)
        forms: dict[str, dict[str, Any]] = content["merged"]
        shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
        layers = frozenset(content["layers"])
        kinds = {name: Kind(kind["name"], tuple(kind["shape"])) for name, kind in content["kinds"].items()}
        turned: dict[str, bool] = content["tensors"]

        def weight(name: str) -> Weight:
            return _read_weight(name, forms[name], tensors, deltas, shapes[name], name in layers)

        state = State(
            content["method"],
            content["variant"],
            content["options"],
            content["t"],
            Lazy(list(forms), weight),
            shapes,
            content["layers"],
            kinds,
            content["scalars"],
            Lazy(list(turned), lambda name: _read(tensors, f"T/{name}", turned[name])),
            tuple(Absorbed(**one) for one in content["absorbed"]),
            content["base_model"],
            content["linear"],
        )
        return Record(state, content["measures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{who}: {STATE} is not what this version writes ({type(error).__name__}: {error}). Take the folder from a "
            "backup, or start again.",
            "state-damaged",
        ) from error


_ADVICE = "Nothing was changed. Take the folder from a backup, or start again."


def check_sums(folder: Path, who: str) -> list[str]:
    """Return the files that belong to a directory, sorted, each as its hash says.

    Raises:
        AdapterError: One is missing or has other bytes; or the list itself is gone.
    """
    listed = listed_files(folder, who)
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise AdapterError(f"{who}: {name} is missing. {_ADVICE}", "state-damaged")
        if (got := sha256_file(folder / name)) != expected:
            raise AdapterError(
                f"{who}: {name} is damaged: its SHA-256 is {got[:12]}..., expected {expected[:12]}.... {_ADVICE}",
                "state-damaged",
            )
    return sorted(listed)


def listed_files(folder: Path, who: str) -> dict[str, str]:
    """Return the hash of every file that belongs to a directory, by name, as its list has them; none is checked.

    Raises:
        AdapterError: The list is gone or damaged.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{who}: {SUMS} cannot be read ({error}); the state is incomplete. {_ADVICE}", "state-damaged"
        ) from error
    listed: dict[str, str] = {}
    for line in lines:
        # The list is as untrusted as the rest: a name must stay inside.
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]\S.*|[^/\\\s])", line)
        if found is None or ".." in Path(found[2]).parts:
            raise AdapterError(f"{who}: {SUMS} is damaged (line {line[:80]!r}). {_ADVICE}", "state-damaged")
        listed[found[2]] = found[1]
    if STATE not in listed:
        raise AdapterError(f"{who}: {SUMS} does not list {STATE}; the state is incomplete. {_ADVICE}", "state-damaged")
    return listed


def is_state_file(name: str) -> bool:
    """True for the files of a state, as opposed to those of its merge."""
    return name in (STATE, SUMS) or bool(re.fullmatch(rf"{STEM}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name))


def _check_format(folder: Path, who: str) -> None:
    """Raise where a newer version wrote the state: said before its hashes, which that version may keep elsewhere."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # Damaged; the hashes say which file.
    if isinstance(version, int) and version > FORMAT:
        raise AdapterError(
            f"{who}: its state has format {version}, written by nscmerge {content.get('nscmerge', '(unknown)')}; this "
            f"one ({nscmerge.__version__}) reads formats up to {FORMAT}. Update nscmerge; nothing was changed.",
            "state-newer",
        )


def _files(folder: Path, who: str) -> list[Path]:
    """Return the files of a state's tensors; none where it has no tensors of its own."""
    single = folder / f"{STEM}.safetensors"
    index = folder / f"{STEM}.safetensors.index.json"
    if single.is_file():
        return [single]
    return indexed_files(index, who) if index.is_file() else []


def _write_weight(
    writer: ShardWriter, name: str, weight: Weight, deltas: Mapping[str, Tensor], layer: bool
) -> dict[str, Any]:
    """Write one weight, unless the merge holds the same bits, and return how to read it back."""
    if isinstance(weight, LowRank):
        turned = {part: _add(writer, f"{part}/{name}", getattr(weight, part)) for part in "AB"}
        return {"form": "factors", "scaling": weight.scaling, "turned": turned}
    key = _delta_key(name, layer)
    if weight.dtype == torch.float32 and key in deltas and weight.is_contiguous():
        there = deltas[key].reshape(weight.shape)
        if torch.equal(there.view(torch.int32), weight.cpu().view(torch.int32)):
            return {"form": "delta"}
    return {"form": "tensor", "turned": _add(writer, f"M/{name}", weight)}


def _read_weight(
    name: str,
    form: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    shape: tuple[int, ...],
    layer: bool,
) -> Weight:
    if form["form"] == "factors":
        A, B = (_read(tensors, f"{part}/{name}", form["turned"][part]) for part in "AB")
        return LowRank(A, B, form["scaling"])
    if form["form"] == "delta":
        return deltas[_delta_key(name, layer)].reshape(shape).clone()
    return _read(tensors, f"M/{name}", form["turned"])


def _delta_key(name: str, layer: bool) -> str:
    return f"{name}.weight" if layer else name


def _add(writer: ShardWriter, key: str, tensor: Tensor) -> bool:
    """Write a tensor; return whether it lies column by column in memory and was written transposed.

    The same numbers in another layout can take another way through BLAS and round differently, and a merge that goes on
    from disk has to be the same to the last bit.
    """
    turned = tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
    writer.add(key, tensor.T if turned else tensor.contiguous())
    return turned


def _read(tensors: Mapping[str, Tensor], key: str, turned: bool) -> Tensor:
    # Own memory, aligned as torch aligns it: the file's offsets are not, and BLAS may round differently then.
    tensor = tensors[key].clone()
    return tensor.T if turned else tensor
