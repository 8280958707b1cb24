"""Greedy generation of one answer: each step's logits with gradient, or the answer alone, without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nscmerge.batching import MASK
from nscmerge.errors import ConfigError

IDS = "input_ids"
DECODER_IDS = "decoder_input_ids"
Inputs = Mapping[str, Tensor]


def start_decoder(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs with the decoder's start token where the model has a decoder that waits for one.

    Raises:
        ConfigError: The model's configuration names no start token.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or any(name.startswith("decoder_in") for name in inputs):
        return inputs
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(
            f"{type(model).__name__} has a decoder, and its config names no decoder_start_token_id to start it with; "
            "set it in config.json."
        )
    first = next(iter(inputs.values()))
    ids = torch.full((len(first), 1), int(start), dtype=torch.long, device=first.device)
    return {**inputs, DECODER_IDS: ids}


def grows(inputs: Inputs) -> str:
    """Return the name of the input that answers are written into: the decoder's where there is one.

    Raises:
        ConfigError: The inputs are no tokens.
    """
    for name in (DECODER_IDS, IDS):
        if name in inputs:
            return name
    raise ConfigError(f"an answer grows the input '{IDS}', which is not among {sorted(inputs)}; use first_token.")


def greedy_logits(
    predict: Callable[[Inputs], Tensor], inputs: Inputs, *, eos: Collection[int], most: int
) -> Iterator[Tensor]:
    """Yield the next token's logits, (V,), at every step of a greedy answer, the step that ends it included.

    Every step is a pass of its own over all tokens so far, without a cache: its graph reaches the coefficients through
    every token, and may be freed before the next step is asked for.

    Args:
        predict: From inputs to the next token's logits, (V,).
        inputs: Of one sample, batch size 1, without padding.
        eos: Tokens that end an answer.
        most: Steps at most, 1 at least.
    """
    for step in range(most):
        logits = predict(inputs)
        yield logits
        token = int(logits.detach().argmax())
        if token in eos or step + 1 == most:
            return
        inputs = append(inputs, [token])


@torch.no_grad()
def greedy_answer(
    model: nn.Module, inputs: Inputs, *, eos: Collection[int], most: int, together: bool = False
) -> list[int]:
    """Return the tokens of a greedy answer, the one that ends it included, one at least.

    Runs with a cache where the model has one, so that every token is computed once.

    Args:
        model: Gives ``logits`` (1, T, V).
        inputs: Of one sample, batch size 1, without padding; ``decoder_input_ids`` among them for a decoder.
        eos: Tokens that end an answer.
        most: Tokens at most, 1 at least.
        together: Go on, for nothing, until all processes have their answer: they share the model's weights.

    Raises:
        ConfigError: The model gives no logits.
    """
    known = inspect.signature(model.forward).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    caches = "past_key_values" in known and (takes_more or "use_cache" in known)
    options: dict[str, Any] = {"use_cache": True} if caches else {}
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    key, given, said, length = grows(inputs), dict(inputs), list[int](), 0
    while True:
        out = model(**given, **options)
        said.append(int(_last_logits(out, model).argmax()))
        if not length and (said[-1] in eos or len(said) == most):
            length = len(said)
        if _everyone(length > 0, together, out.logits.device):
            return said[:length]
        whole = append(inputs, said)
        cache = getattr(out, "past_key_values", None) if caches else None
        if cache is None:
            given = whole
            continue
        # What the cache stands for is left out: earlier tokens, images, the encoder's pass.
        given = {key: whole[key][:, -1:], **({MASK: whole[MASK]} if MASK in whole else {})}
        options["past_key_values"] = cache
        if key == DECODER_IDS:
            options["encoder_outputs"] = (out.encoder_last_hidden_state,)


def _everyone(done: bool, together: bool, device: torch.device) -> bool:
    """Return ``done``, of all processes where they go together."""
    if not together:
        return done
    flag = torch.tensor(int(done), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
    return bool(flag)


def _last_logits(out: Any, model: nn.Module) -> Tensor:
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ConfigError(
            f"an answer needs next-token logits, and {type(model).__name__} gives none. Load the base model with its "
            "language head (model_class AutoModelForCausalLM, AutoModelForImageTextToText or AutoModelForSeq2SeqLM), "
            "or use position first_token."
        )
    return logits[0, -1]


def append(inputs: Inputs, tokens: list[int]) -> dict[str, Tensor]:
    """Return one sample's inputs with more tokens, which are no padding."""
    key = grows(inputs)
    length = inputs[key].shape[1]
    grown = dict(inputs)
    new = torch.tensor([tokens], dtype=inputs[key].dtype, device=inputs[key].device)
    grown[key] = torch.cat([inputs[key], new], dim=1)
    if key == DECODER_IDS:
        return grown
    if MASK in inputs:
        grown[MASK] = nn.functional.pad(inputs[MASK], (0, len(tokens)), value=1)
    for name, value in inputs.items():
        if name not in (IDS, MASK) and value.ndim == 2 and value.shape[1] == length:
            raise ConfigError(
                f"whole answers: nobody knows how input '{name}', {tuple(value.shape)}, goes on with a new token; let "
                "the model derive it from the tokens, or use first_token."
            )
    return grown


def end_of_answer(model: nn.Module, given: int | list[int] | None) -> frozenset[int]:
    """Return the tokens that end an answer: the given ones, else those of the model's own configuration.

    Raises:
        ConfigError: Neither says which.
    """
    found = given
    for name in ("generation_config", "config"):
        found = getattr(getattr(model, name, None), "eos_token_id", None) if found is None else found
    text = getattr(getattr(model, "config", None), "text_config", None)
    found = getattr(text, "eos_token_id", None) if found is None else found
    if found is None:
        raise ConfigError(
            f"it must be known which token ends an answer, and {type(model).__name__} does not say. Set the "
            "objective's eos_token_id; an empty list means that answers end at max_new_tokens alone."
        )
    return frozenset([found] if isinstance(found, int) else found)
