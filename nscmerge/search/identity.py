"""What a measured value depends on, as hashes: base, experts, method, criterion and the very samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import nn

import nscmerge
from nscmerge.adapters import Adapter
from nscmerge.base_model import BaseModel, source_of, weights_sha256
from nscmerge.pretrained import Pretrained
from nscmerge.search.criterion import Criterion
from nscmerge.search.hashes import tensors_sha256
from nscmerge.search.plan import Samples


def base_identity(base: BaseModel, dtype: str | None, sha256: str | None) -> dict[str, Any]:
    """Return name, hash of the weights, and dtype of the base model; ``sha256`` saves hashing a checked file again."""
    if isinstance(base, nn.Module):
        weights = tensors_sha256(sorted(base.state_dict().items()))
        return {"name": type(base).__name__, "sha256": weights, "dtype": dtype}
    record: dict[str, Any] = {"name": source_of(base), "sha256": sha256 or weights_sha256(base), "dtype": dtype}
    if isinstance(base, Pretrained):
        # How activations are kept, and what the hash must be, change no value.
        record["form"] = asdict(replace(base, sha256=None, checkpointing=False))
    return record


def adapter_identity(adapter: Adapter) -> dict[str, Any]:
    """Return where an adapter came from, the hash of its file, and that of all that it holds, its head included."""
    named = [(f"{n}.{part}", t) for n, e in sorted(adapter.layers.items()) for part, t in (("A", e.A), ("B", e.B))]
    named += [(f"{n}.s", torch.tensor(e.scaling, dtype=torch.float64)) for n, e in sorted(adapter.layers.items())]
    for tensors in (adapter.dense, adapter.saved, adapter.head):
        named += sorted(tensors.items())
    return {"source": adapter.source, "sha256": adapter.sha256, "content_sha256": tensors_sha256(named)}


def criterion_identity(criterion: Criterion, samples: Samples) -> dict[str, Any]:
    """Return class and options of a criterion, and the samples that it is measured on."""
    path = f"{type(criterion).__module__}.{type(criterion).__qualname__}"
    return {"class_path": path, "options": criterion.options(), "samples": samples._asdict()}


def candidate_keys(origin: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Return by (method, criterion) the hash of all that a value depends on, beside the scale.

    Args:
        origin: ``base``, ``inputs`` and ``criteria`` as the functions above give them.
        methods: What is merged by name, dataclasses or JSON-able.
    """
    return {
        (method, name): _key(
            {
                "version": nscmerge.__version__,
                "base": origin["base"],
                "inputs": {task: entry["content_sha256"] for task, entry in origin["inputs"].items()},
                "criterion": criterion,
                "method": asdict(spec) if is_dataclass(spec) and not isinstance(spec, type) else spec,
            }
        )
        for method, spec in methods.items()
        for name, criterion in origin["criteria"].items()
    }


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]
