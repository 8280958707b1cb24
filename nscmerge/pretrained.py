"""Pretrained: which model class of transformers to build from which weights, and in what form to hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nscmerge.errors import ConfigError
from nscmerge.naming import nearest

TIMM_SCHEME = "timm:"


@dataclass(frozen=True)
class Pretrained:
    """A frozen base model by source and class, for the models that ``AutoModel`` does not give.

    Args:
        source: Local folder, hub id, or ``package:NAME/FOLDER``; also ``timm:...``, which has no class to choose.
        model_class: Class in transformers: ``AutoModel`` (encoder, or decoder without a language model head),
            ``AutoModelForCausalLM``, ``AutoModelForSeq2SeqLM``, ``AutoModelForImageTextToText``,
            ``CLIPVisionModelWithProjection``, ...
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the dtype that the weights are stored in.
        sha256: What the weights of a local source must hash to; None takes any.
        quantize: Hold linear layers in ``8bit`` or ``4bit`` (bitsandbytes); None as stored.
        gguf_file: File in ``source`` to read, and dequantise, in place of safetensors weights.
        checkpointing: Recompute the activations of blocks in the backward pass of a merge instead of keeping them:
            less memory, about a third more time. See :mod:`nscmerge.checkpointing`.

    Raises:
        ConfigError: ``timm:`` with options that timm models do not have, or quantised weights in a GGUF file.
    """

    source: str
    model_class: str = "AutoModel"
    dtype: str | None = None
    sha256: str | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    gguf_file: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        own = {"model_class": self.model_class != "AutoModel", "quantize": self.quantize, "gguf_file": self.gguf_file}
        if self.source.startswith(TIMM_SCHEME) and (given := [name for name, value in own.items() if value]):
            raise ConfigError(f"base model '{self.source}': {', '.join(given)} is for models of transformers; drop it.")
        if self.quantize and self.gguf_file:
            raise ConfigError(
                f"base model '{self.source}': quantize and gguf_file are both set; a GGUF file is dequantised when "
                "read. Choose one."
            )


def load_transformers(spec: Pretrained, path: str) -> nn.Module:
    """Return the model with its weights, none of them made up.

    Args:
        spec: What to load.
        path: Folder or hub id that ``spec.source`` means.

    Raises:
        ConfigError: No such class, or weights that cannot be had or do not fill it; the message says which.
    """
    import transformers

    name = spec.model_class
    known = [n for n in dir(transformers) if n.startswith("AutoModel") or n.endswith(("Model", "WithProjection"))]
    model_class: Any = getattr(transformers, name, None)
    if not hasattr(model_class, "from_pretrained"):
        raise ConfigError(
            f"base model '{spec.source}': transformers {transformers.__version__} has no model class '{name}'"
            f"{nearest(name, known) or '.'} Set model_class to one of its classes, such as AutoModelForCausalLM."
        )
    try:
        # No remote code, and safetensors only: a pickle could run code on loading.
        model, found = model_class.from_pretrained(
            path, dtype=spec.dtype or "auto", output_loading_info=True, trust_remote_code=False, **_form(spec)
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"base model '{spec.source}' cannot be loaded as {name}: {_reason(error)}") from error
    # AutoModel may lack a pooler that nobody reads; of a class that was asked for, every part counts.
    if name != "AutoModel" and (missing := sorted(found["missing_keys"])):
        raise ConfigError(
            f"base model '{spec.source}' has no weights for {len(missing)} tensors of {type(model).__name__} "
            f"({', '.join(missing[:3])}, ...), which would be random. Its config.json says which class it was saved "
            "from; set model_class to that one."
        )
    # Nothing here reads a cache of keys and values but generation, which asks for it.
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        if getattr(config, "use_cache", False):
            config.use_cache = False
    loaded: nn.Module = model
    return loaded


def _form(spec: Pretrained) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say how weights are read and held."""
    if spec.gguf_file is not None:
        return {"gguf_file": spec.gguf_file}
    options: dict[str, Any] = {"use_safetensors": True}
    if spec.quantize is not None:
        from transformers import BitsAndBytesConfig

        dtype = getattr(torch, spec.dtype) if spec.dtype else torch.bfloat16
        bits: dict[str, Any] = {"load_in_8bit": True}
        if spec.quantize == "4bit":
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
    return options


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """Return why a model cannot be loaded and what to do, told from the chain of errors behind it."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    kinds = {type(cause).__name__ for cause in _causes(error)}
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return (
            "its owner gives access on request (gated). Accept the licence on the model's page, then log in "
            "(`hf auth login`) or set HF_TOKEN."
        )
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such model, or it is private. Check the spelling, and your login."
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "MaxRetryError"}:
        return (
            "the hub cannot be reached from here and the model is not in the cache. Download it elsewhere and give "
            "its folder, or connect."
        )
    if isinstance(error, ImportError):
        return f"{said} Install what it names."
    return (
        f"{said} Expected a folder with config.json and safetensors weights of such a model, or the id of one on the "
        "hub that can be reached from here."
    )
