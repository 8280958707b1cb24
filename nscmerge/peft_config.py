"""What an ``adapter_config.json`` of PEFT means, and the one that we write: which update, at which scale."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nscmerge.errors import AdapterError

#: ``init_lora_weights`` values that leave the base weight alone. PiSSA, OLoRA, CorDA, LoftQ, ... change it, so their
#: factors are an update of a base model that is not the published one.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

#: Config fields that, when set, make the update something else than ``scaling * B @ A``, and what they mean.
_REFUSED = {
    "use_dora": "DoRA, which also rescales the base weight",
    "lora_bias": "lora_bias, a bias beside B",
    "use_qalora": "QA-LoRA, which pools the input in groups",
    "use_bdlora": "BD-LoRA with block-diagonal factors",
    "target_parameters": "target_parameters, LoRA on bare parameters such as fused experts",
    "layer_replication": "layer_replication, which changes the layers of the base model",
    "trainable_token_indices": "trainable_token_indices, single rows of the embedding",
    "alora_invocation_tokens": "activated LoRA, which is switched on by tokens of the input",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base weight",
    "monteclora_config": "MonteCLoRA, which draws its factors",
    "target_modules_to_tie": "LoRA factors tied between layers",
    "ensure_weight_tying": "ensure_weight_tying, tensors tied between modules",
}


def read_config(path: Path, who: str) -> dict[str, Any]:
    """Return the checked content of an ``adapter_config.json``: plain LoRA, and nothing that the algebra cannot hold.

    Args:
        path: The file.
        who: The adapter as messages name it.

    Raises:
        AdapterError: The file is not JSON, or describes something else than plain LoRA; the message says what.
    """
    config = parse_config(path, who)
    for fault in config_faults(config, who):
        raise fault
    return config


def parse_config(path: Path, who: str) -> dict[str, Any]:
    """Return the content of an ``adapter_config.json`` unchecked.

    Raises:
        AdapterError: The file cannot be read, or holds no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{who}: {path.name} is not valid JSON ({error}). Copy the adapter again.", "config-damaged"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{who}: {path.name} holds a {type(config).__name__}; expected an object with peft_type 'LORA'. Copy the "
            "adapter again.",
            "config-damaged",
        )
    return config


def config_faults(config: Mapping[str, Any], who: str) -> Iterator[AdapterError]:
    """Yield, as an error that is not raised, every reason why an adapter of this config is not plain LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        yield AdapterError(
            f"{who}: peft_type in adapter_config.json is {kind!r}; expected 'LORA', the only type that is merged. "
            "Train this adapter as plain LoRA.",
            "not-lora",
        )
    for field, meaning in _REFUSED.items():
        if config.get(field):
            yield AdapterError(
                f"{who}: {field} is set, that is {meaning}; its update is not scaling * B @ A of the base model's own "
                "weight. Train this adapter as plain LoRA.",
                "dora" if field == "use_dora" else "unsupported-lora",
            )
    # The comparison by type keeps 1 and 0 from passing for True and False.
    init = config.get("init_lora_weights", True)
    if not any(init == plain and type(init) is type(plain) for plain in PLAIN_INITS):
        yield AdapterError(
            f"{who}: init_lora_weights is {init!r}, which changes the base weight (or may); allowed are "
            f"{', '.join(map(repr, PLAIN_INITS))}. PEFT converts such an adapter to plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=<folder of the untrained adapter>).",
            "changed-base",
        )
    modules = config.get("modules_to_save") or []
    for field, fine, expected in (
        ("rank_pattern", isinstance(config.get("rank_pattern") or {}, dict), "an object {pattern: number}"),
        ("alpha_pattern", isinstance(config.get("alpha_pattern") or {}, dict), "an object {pattern: number}"),
        ("modules_to_save", isinstance(modules, list) and all(isinstance(m, str) for m in modules), "a list of names"),
        ("base_model_name_or_path", isinstance(config.get("base_model_name_or_path") or "", str), "a name or null"),
    ):
        if not fine:
            yield AdapterError(
                f"{who}: {field} in adapter_config.json is {config[field]!r}; expected {expected}. Save it with PEFT.",
                "config-value",
            )


def pattern_key(patterns: Sequence[str], layer: str) -> str:
    """Return the first pattern that matches the end of ``layer``, at a dot or from its start; else ``layer`` itself.

    The rule by which PEFT >= 0.15 looks up ``rank_pattern`` and ``alpha_pattern`` (``get_pattern_key``).
    """
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), layer)


def rank_and_scaling(config: Mapping[str, Any], layer: str, who: str) -> tuple[int, float]:
    """Return the rank that the config states for ``layer``, and s = alpha / r (alpha / sqrt(r) for rsLoRA).

    Raises:
        AdapterError: A pattern is no regular expression, or rank or alpha is no usable number.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        # 8 is PEFT's own default for both.
        rank = ranks.get(pattern_key(list(ranks), layer), config.get("r", 8))
        alpha = alphas.get(pattern_key(list(alphas), layer), config.get("lora_alpha", 8))
    except re.error as error:
        raise AdapterError(
            f"{who}: a key of rank_pattern or alpha_pattern is not a regular expression ({error}).", "config-value"
        ) from error
    if type(rank) is not int or rank < 1:
        raise AdapterError(
            f"{who}, layer '{layer}': the config gives rank {rank!r}; expected a whole number >= 1.", "config-value"
        )
    if type(alpha) not in (int, float) or not -1e30 < alpha < 1e30:  # also false for NaN
        raise AdapterError(
            f"{who}, layer '{layer}': the config gives alpha {alpha!r}; expected a finite number.", "config-value"
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the default rank and the ``rank_pattern`` from which PEFT reads exactly ``ranks``.

    Plain full names are tried first, long ones before short ones: PEFT before 0.15 looks full names up exactly and
    cannot read anchors. A name can match another layer's end (``a.b`` in ``x.a.b``); if that would change a rank,
    every layer gets an entry of its own, escaped and anchored with ``^``.

    Args:
        ranks: Layer name to rank, not empty.
    """
    # The most frequent rank, the smaller one of two equally frequent.
    default = min(Counter(ranks.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    names = sorted((n for n in ranks if ranks[n] != default), key=lambda n: (-len(n), n))
    plain = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    if plain and all(ranks.get(pattern_key(names, layer), default) == rank for layer, rank in ranks.items()):
        return default, {name: ranks[name] for name in names}
    return default, {f"^{re.escape(name)}": ranks[name] for name in sorted(ranks)}


def target_pattern(layers: Sequence[str]) -> str:
    """Return the regular expression for ``target_modules`` that matches exactly these module names.

    A list would be matched by suffix, so that ``a.b`` also hits ``x.a.b`` of the base model; PEFT matches a string
    against the whole name.
    """
    return "|".join(re.escape(name) for name in sorted(layers))


def make_config(
    ranks: Mapping[str, int], base_model: str | None, modules_to_save: Sequence[str], bias: str
) -> dict[str, Any]:
    """Return the smallest ``adapter_config.json`` that says it all: alpha = rank, rsLoRA off, exact names.

    Args:
        ranks: Layer name to rank of its factors.
        base_model: Hub id or path of the base model, or None.
        modules_to_save: Full names of modules stored whole.
        bias: Which trained biases are stored: ``none``, ``lora_only`` or ``all``.
    """
    default, pattern = rank_pattern(ranks)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": target_pattern(list(ranks)),
        "modules_to_save": sorted(modules_to_save) or None,
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
