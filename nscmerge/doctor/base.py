"""What a base model's config and safetensors headers say; its weights are never read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nscmerge.base_model import resolve_source
from nscmerge.doctor.findings import Finding, some
from nscmerge.doctor.intake import Candidate
from nscmerge.errors import ConfigError
from nscmerge.layer_names import canonical, same_layer
from nscmerge.peft_format import is_vocabulary

_CONFIG = "config.json"


@dataclass(frozen=True)
class BaseFacts:
    """What can be known of a base model without its weights.

    Args:
        source: What the user gave.
        vocabulary: ``vocab_size`` of its config, None if it states none.
        shapes: Shape of every tensor by name, from the headers; empty if there are none here or they are quantised.
        quantised: Its stored shapes are those of packed weights.
    """

    source: str
    vocabulary: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    quantised: bool = False

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, also where another wrapping of the model spells its name; None if unknown."""
        if tensor in self.shapes:
            return self.shapes[tensor]
        parts = tensor.split(".")
        tails = (".".join(parts[i:]) for i in range(1, len(parts) - 1))
        found = {self.shapes[tail] for tail in tails if tail in self.shapes}
        found |= {shape for name, shape in self.shapes.items() if name.endswith(f".{tensor}")}
        found = found or {self.shapes[name] for name in self._spelled.get(canonical(tensor), ())}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _spelled(self) -> Mapping[str, list[str]]:
        return same_layer(self.shapes)


def read_facts(source: str) -> BaseFacts:
    """Return what config.json and the safetensors headers say. Of a hub id only config.json is fetched.

    Raises:
        ConfigError: Nothing is there, or it is damaged; the message says what.
    """
    try:
        place = Path(resolve_source(source))
        if not place.exists():
            place = _fetch(source)
        file = place / _CONFIG if place.is_dir() else place.with_name(_CONFIG)
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        headers = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        shapes = {name: shape for path in headers for name, shape in _header(path)}
    except (OSError, ValueError, RecursionError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"base model '{source}' cannot be read ({type(error).__name__}: {reason}).") from error
    if not isinstance(config, dict) or not (config or shapes):
        raise ConfigError(f"base model '{source}' has neither a {_CONFIG} with an object in it nor safetensors files.")
    if config.get("quantization_config"):
        return BaseFacts(source, _vocabulary(config), quantised=True)
    return BaseFacts(source, _vocabulary(config), shapes)


def _fetch(hub_id: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.startswith("."):
        raise ConfigError(f"'{hub_id}' is neither there nor a hub id like 'owner/name'")
    # Imported here: the hub client costs half a second that a local folder does not need.
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=[_CONFIG]))


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, tuple(file.get_slice(name).get_shape())


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    """Multimodal models state it in the config of their language model."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        if type(size := part.get("vocab_size")) is int:
            return size
    return None


def compare(candidates: Sequence[Candidate], base: BaseFacts) -> Iterator[Finding]:
    """Yield where adapters do not fit the base model: widths, vocabulary, layers that it does not have."""
    if base.quantised:
        yield Finding("base-quantised", f"'{base.source}' is stored quantised, so its tensors have packed shapes.")
    for candidate in candidates:
        adapter = candidate.adapter
        if adapter is None:
            continue
        own: dict[str, tuple[int, ...]] = {f"{n}.weight": (f.d_out, f.d_in) for n, f in adapter.layers.items()}
        own |= {name: tuple(tensor.shape) for name, tensor in adapter.saved.items()}
        yield from _misfits(candidate.name, own, base)
        absent = [name.removesuffix(".weight") for name in own if base.shapes and base.shape(name) is None]
        if absent:
            yield Finding(
                "layers-not-in-base",
                f"{len(absent)} of {len(own)} layers are not among the tensors of '{base.source}': {some(absent)}.",
                (candidate.name,),
                tuple(absent),
            )


def _misfits(name: str, own: Mapping[str, tuple[int, ...]], base: BaseFacts) -> Iterator[Finding]:
    """Yield tensors of one adapter whose shape is not the base's, one finding for each pair of shapes."""
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for tensor, shape in own.items():
        vocabulary = is_vocabulary(tensor)
        expected = base.shape(tensor)
        if expected is None and vocabulary and base.vocabulary is not None:
            expected = (base.vocabulary, *shape[1:])
        if expected is not None and not _fits(shape, expected):
            rows_only = vocabulary and shape[1:] == expected[1:]
            code = "vocabulary-mismatch" if rows_only else "base-width-mismatch"
            groups.setdefault((code, shape, expected), []).append(tensor.removesuffix(".weight"))
    for (code, shape, expected), tensors in groups.items():
        found = f"{some(tensors)}: the adapter has {shape}, the base model '{base.source}' {expected}."
        yield Finding(code, found, (name,), tuple(tensors))


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Compare (d_out, d_in) with a stored weight, whose kernel is flattened and which GPT-2's Conv1D transposes."""
    if len(shape) == 2 and len(expected) > 2:
        size = 1
        for width in expected[1:]:
            size *= width
        expected = (expected[0], size)
    return shape in (expected, expected[::-1] if len(shape) == 2 else expected)
