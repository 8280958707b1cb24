"""Reads one adapter as far as it goes: what is sound of it, and every fault on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from nscmerge.adapter_files import CONFIG, DELTA, INDEX, WEIGHTS, find_weights, read_tensors
from nscmerge.adapters import Adapter, local_folder, read_folder
from nscmerge.base_model import resolve_source
from nscmerge.doctor.findings import KINDS, Finding, some
from nscmerge.errors import AdapterError
from nscmerge.peft_config import config_faults, parse_config
from nscmerge.peft_format import Faults, collected, parse


@dataclass(frozen=True, eq=False)
class Candidate:
    """One adapter on the list.

    Args:
        name: As messages call it; no other candidate has this name.
        source: What the user gave: a folder or a hub id.
        folder: Where it lies, None if nothing is there.
        adapter: What of it could be understood, faulty layers left out; None if nothing.
        faults: Why it cannot be merged as it is.
        broken: Layers and tensors that were left out.
    """

    name: str
    source: str
    folder: Path | None = None
    adapter: Adapter | None = None
    faults: tuple[Finding, ...] = ()
    broken: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int | None:
        """Bytes of its weight files on disk, None if there are none."""
        if self.folder is None:
            return None
        shards = self.folder.glob("adapter_model-*.safetensors") if (self.folder / INDEX).is_file() else ()
        files = [self.folder / WEIGHTS, self.folder / DELTA, *shards]
        return sum(file.stat().st_size for file in files if file.is_file()) or None


def read(source: str, name: str) -> Candidate:
    """Return an adapter with its faults; raises nothing, whatever is there."""
    who = f"adapter '{name}' ({source})"
    try:
        folder = local_folder(resolve_source(source))
    except (OSError, ValueError, ImportError) as error:
        reason = error if isinstance(error, AdapterError) else AdapterError(str(error), "not-found")
        return Candidate(name, source, faults=_findings([("", reason)], name, who))
    try:
        return Candidate(name, source, folder, read_folder(folder, name, source))
    except (AdapterError, OSError) as error:
        first = error if isinstance(error, AdapterError) else AdapterError(f"{who}: {error}. Make it readable.")
    faults: Faults = []
    adapter = _go_on(folder, name, source, faults)
    if first.code not in {fault.code for _, fault in faults}:
        faults.insert(0, ("", first))
    return Candidate(name, source, folder, adapter, _findings(faults, name, who), tuple(key for key, _ in faults))


def _go_on(folder: Path, name: str, source: str, faults: Faults) -> Adapter | None:
    """Collect all faults that config and weights have, and return what is left, None if neither can be read."""
    who = f"adapter '{name}' ({source})"
    config = None
    with collected(faults, ""):
        if (folder / CONFIG).is_file():
            config = parse_config(folder / CONFIG, who)
            faults += [("", fault) for fault in config_faults(config, who)]
    files: list[Path] = []
    with collected(faults, ""):
        files = find_weights(folder, who)
    tensors: dict[str, Tensor] = {}
    for file in files:
        with collected(faults, ""):
            tensors |= read_tensors([file], who)
    # Without these, what the keys mean is anybody's guess.
    unclear = {fault.code for _, fault in faults} & {"not-lora", "config-value"}
    if config is None or not tensors or unclear:
        return None
    parsed = parse(tensors, config, who, faults)
    base = config.get("base_model_name_or_path") or None
    return Adapter(parsed.layers, base, name=name, saved=parsed.saved, kinds=parsed.kinds, source=source)


def _findings(faults: Faults, name: str, who: str) -> tuple[Finding, ...]:
    """Return faults as findings: those of one kind in many layers become one."""
    groups: dict[tuple[str, int], Faults] = {}
    for i, (layer, fault) in enumerate(faults):
        groups.setdefault((fault.code, -1 if layer else i), []).append((layer, fault))
    findings = []
    for (code, _), group in groups.items():
        # Our messages end with what to do, in a sentence of its own where it is not plain from the rest.
        found, _, remedy = str(group[0][1]).removeprefix(who).lstrip(":, ").rpartition(". ")
        found, remedy = (found, remedy) if found else (remedy, "")
        layers = tuple(dict.fromkeys(layer for layer, _ in group if layer))
        more = f" The same in {some(layers[1:])}." if len(layers) > 1 else ""
        known = code if code in KINDS else "unmergeable"
        findings.append(Finding(known, f"{found.rstrip('.')}.{more}", (name,), layers, remedy or None))
    return tuple(findings)


def labels(names: Sequence[str | None], sources: Sequence[str]) -> list[str]:
    """Return a different label for each adapter: its given name, or as much of its path's end as tells it apart.

    Args:
        names: Names that the user gave, None where none was given.
        sources: Folders or hub ids.
    """
    paths = [Path(os.path.abspath(source)).parts for source in sources]
    plain = [name or path[-1] for name, path in zip(names, paths, strict=True)]
    chosen = []
    for i, label in enumerate(plain):
        rivals = [paths[j] for j, other in enumerate(plain) if j != i and other == label]
        if rivals and names[i] is None:
            lengths = (n for n in range(2, len(paths[i])) if all(rival[-n:] != paths[i][-n:] for rival in rivals))
            label = "/".join(paths[i][-next(lengths, 1) :])
        chosen.append(label)
    # What is still equal (one name given twice, one path listed twice) is numbered.
    return [
        label if chosen.count(label) == 1 else f"{label} #{chosen[: i + 1].count(label)}"
        for i, label in enumerate(chosen)
    ]
