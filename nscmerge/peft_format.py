"""The tensor keys of a PEFT LoRA file: from names and shapes to layers and back. Nothing else parses keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.peft_config import rank_and_scaling

PREFIX = "base_model.model."

_LORA = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB])")
#: Embeddings that PEFT stores whole beside LoRA when the vocabulary was resized or the embedding is a target.
EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "wte", "embed_out")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_vocabulary(name: str) -> bool:
    """Return True for a layer, or its weight, whose rows are the vocabulary's tokens."""
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


@dataclass(frozen=True)
class Kind:
    """How a layer that is no ``nn.Linear`` stores its factors; layers without an entry are linear.

    Args:
        name: ``embedding`` (A and B hold the transposed factors, so that the product has the weight's own shape) or
            ``conv`` (A's input channels and kernel are flattened into d_in).
        shape: For ``conv``: (channels in, *kernel); empty for ``embedding``.
    """

    name: Literal["embedding", "conv"]
    shape: tuple[int, ...] = ()


@dataclass
class Parsed:
    """What the tensors of an adapter file hold, by base model name."""

    layers: dict[str, LowRank] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)


def check_tensor(tensor: Tensor, what: str) -> None:
    """Raise unless ``tensor`` is fp16, bf16, fp32 or fp64 and finite; ``what`` names adapter, layer and tensor.

    Raises:
        AdapterError: Another dtype, or NaN or Inf.
    """
    if tensor.dtype not in _FLOATS:
        raise AdapterError(f"{what} is {tensor.dtype}; expected fp16, bf16, fp32 or fp64. Convert it first.", "dtype")
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(
            f"{what} holds {bad} NaN or Inf of {tensor.numel()} values; that training run diverged.", "not-finite"
        )


#: What ``parse`` could not take, each with the layer or tensor that it is about.
Faults = list[tuple[str, AdapterError]]


def parse(tensors: Mapping[str, Tensor], config: Mapping[str, Any], who: str, faults: Faults | None = None) -> Parsed:
    """Return layers, kinds and whole tensors of an adapter file; every key must be understood.

    Args:
        tensors: Content of ``adapter_model.safetensors``.
        config: Checked ``adapter_config.json``.
        who: The adapter as messages name it.
        faults: Takes every fault in place of raising the first; layers and tensors with a fault are then left out.

    Raises:
        AdapterError: A key that plain LoRA does not have, a missing partner, shapes or ranks that contradict each
            other or the config, NaN or Inf, no LoRA tensor at all.
    """
    parsed = Parsed()
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        with collected(faults, match["layer"] if match else name):
            if not key.startswith(PREFIX):
                raise AdapterError(
                    f"{who}: unknown key '{key}'; PEFT's keys start with '{PREFIX}'. Save it with PEFT.", "unknown-key"
                )
            if match:
                parts.setdefault(match["layer"], {})[match["part"].removesuffix(".weight")] = tensors[key]
            elif "lora_" in name:
                _refuse_lora_key(key, who)
            elif not _is_copy(key, tensors):
                check_tensor(tensors[key], f"{who}: tensor '{name}'")
                _add_saved(parsed, name, tensors[key], config, who)
    for layer, found in parts.items():
        with collected(faults, layer):
            _add_layer(parsed, layer, found, config, who)
    if not parts:
        with collected(faults, ""):
            raise AdapterError(
                f"{who}: no LoRA tensor in it; expected keys like '{PREFIX}<layer>.lora_A.weight'. Save it with PEFT.",
                "no-lora-tensor",
            )
    return parsed


@contextmanager
def collected(faults: Faults | None, name: str) -> Iterator[None]:
    """Put the block's fault, about layer or tensor ``name``, into ``faults``; raise it where there is no such list."""
    try:
        yield
    except AdapterError as error:
        if faults is None:
            raise
        faults.append((name, error))


def _refuse_lora_key(key: str, who: str) -> None:
    if "lora_magnitude_vector" in key:
        raise AdapterError(
            f"{who}: '{key}' belongs to DoRA, which also rescales the base weight. Train plain LoRA.", "dora"
        )
    if key.endswith(".bias"):
        raise AdapterError(
            f"{who}: '{key}' is a bias beside B (lora_bias), which is no part of B @ A. Train without.",
            "unsupported-lora",
        )
    raise AdapterError(
        f"{who}: unknown LoRA key '{key}'; expected '...lora_A.weight' and '...lora_B.weight' without an adapter name "
        "in them. Save it with PEFT's save_pretrained.",
        "unknown-key",
    )


def _is_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """With ``bias='all'`` PEFT stores biases of whole modules again, under the names of its wrappers."""
    plain = re.sub(r"\.(modules_to_save|original_module)\.", ".", key)
    return plain != key and plain in tensors


def _add_saved(parsed: Parsed, name: str, tensor: Tensor, config: Mapping[str, Any], who: str) -> None:
    """Sort one whole tensor in: of a saved module, a trained bias, or an embedding; anything else is an error."""
    path = name.split(".")
    prefixes = [".".join(path[:i]) for i in range(1, len(path))]
    # PEFT matches modules_to_save by the bare end of the name: 'norm' also saves 'input_layernorm'.
    module = next((p for p in prefixes if p.endswith(tuple(config.get("modules_to_save") or ()))), None)
    name = name.replace(".base_layer.", ".")
    if module is not None:
        parsed.modules.add(module)
    elif not (
        (path[-1] == "bias" and config.get("bias", "none") != "none")
        or (path[-1] == "weight" and len(path) > 1 and (path[-2] == "base_layer" or path[-2] in EMBEDDINGS))
    ):
        raise AdapterError(
            f"{who}: unknown key '{PREFIX}{name}': no LoRA factor, and neither modules_to_save "
            f"({config.get('modules_to_save')}) nor bias ({config.get('bias', 'none')!r}) of the config explains it.",
            "unknown-key",
        )
    parsed.saved[name] = tensor


def _add_layer(parsed: Parsed, layer: str, found: dict[str, Tensor], config: Mapping[str, Any], who: str) -> None:
    where = f"{who}, layer '{layer}'"
    for part, tensor in found.items():
        check_tensor(tensor, f"{where}: {part}" + ("" if "embedding" in part else ".weight"))
    stem = "lora_embedding_" if any("embedding" in part for part in found) else "lora_"
    if missing := {stem + "A", stem + "B"} - set(found):
        raise AdapterError(
            f"{where}: {min(missing)} is missing; only {sorted(found)} is there. Copy it again.", "missing-half"
        )
    if len(found) > 2 or ".base_layer." in f".{layer}.":
        raise AdapterError(
            f"{where}: several adapted tensors share this module ({sorted(found)}); not supported.", "unsupported-lora"
        )
    A, B = found[stem + "A"], found[stem + "B"]
    if A.ndim < 2 or B.ndim != (2 if A.ndim == 2 else A.ndim) or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"{where}: A is {tuple(A.shape)} and B {tuple(B.shape)}; expected two filled matrices, or two convolution "
            "kernels. Empty or flat tensors come from saving a sharded model without gathering it first.",
            "flat-factor",
        )
    if B.shape[1] != A.shape[0] or set(B.shape[2:]) - {1}:
        hint = " Grouped convolutions are not supported." if A.ndim > 2 else ""
        raise AdapterError(
            f"{where}: A is {tuple(A.shape)} and B {tuple(B.shape)}; their ranks differ.{hint}", "rank-conflict"
        )
    rank, scaling = rank_and_scaling(config, layer, who)
    if rank != A.shape[0]:
        raise AdapterError(
            f"{where}: the config says rank {rank} (r or rank_pattern), the tensors have rank {A.shape[0]}; alpha / r "
            "is then unknown. Put the config and the weights of the same training run together.",
            "rank-conflict",
        )
    if stem == "lora_embedding_":
        parsed.kinds[layer] = Kind("embedding")
        parsed.layers[layer] = LowRank(B.T, A.T, scaling)
    else:
        if A.ndim > 2:
            parsed.kinds[layer] = Kind("conv", tuple(A.shape[1:]))
        parsed.layers[layer] = LowRank(A.flatten(1), B.flatten(1), scaling)


def fold(layer: LowRank) -> LowRank:
    """Return the same product with scaling 1, in B; rank 0 becomes one zero row, since files hold no empty factor.

    B keeps its dtype where that loses nothing (a power of two in half precision), else it becomes fp32: rounding a
    folded half-precision B would change the function.
    """
    A, B = layer.A, layer.B
    if layer.rank == 0:
        return LowRank(A.new_zeros(1, layer.d_in), B.new_zeros(layer.d_out, 1))
    wide = layer.scaling * B.to(torch.promote_types(B.dtype, torch.float32))
    narrow = wide.to(B.dtype)
    return LowRank(A, narrow if torch.equal(narrow.to(wide.dtype), wide) else wide)


def encode(layers: Mapping[str, LowRank], kinds: Mapping[str, Kind], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the content of ``adapter_model.safetensors`` for folded layers and whole tensors by base model name."""
    tensors = {}
    for name, layer in layers.items():
        kind = kinds.get(name)
        if kind is not None and kind.name == "embedding":
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = layer.B.T
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = layer.A.T
            continue
        A, B = layer.A, layer.B
        if kind is not None:
            A, B = A.reshape(-1, *kind.shape), B.reshape(*B.shape, *[1] * (len(kind.shape) - 1))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    for name, tensor in saved.items():
        module, _, parameter = name.rpartition(".")
        # PEFT wraps adapted modules, whose own tensors then live one level down.
        tensors[PREFIX + (f"{module}.base_layer.{parameter}" if module in layers else name)] = tensor
    return tensors


def bias_mode(layers: Iterable[str], loose: Iterable[str]) -> str:
    """Return ``none``, ``lora_only`` or ``all`` for the trained biases among ``loose`` tensor names."""
    biases = {name.removesuffix(".bias") for name in loose if name.endswith(".bias")}
    return "none" if not biases else "lora_only" if biases <= set(layers) else "all"
