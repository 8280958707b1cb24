"""Greedy generation of one answer, step by step, each step's logits with gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn

from nscmerge.batching import MASK
from nscmerge.errors import ConfigError

IDS = "input_ids"


def greedy_logits(
    predict: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], *, eos: Collection[int], most: int
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
        inputs = _append(inputs, token)


def _append(inputs: Mapping[str, Tensor], token: int) -> dict[str, Tensor]:
    """Return the inputs with one more token, which is no padding."""
    if IDS not in inputs:
        raise ConfigError(f"full_token grows the input '{IDS}', which is not among {sorted(inputs)}; use first_token.")
    length = inputs[IDS].shape[1]
    grown = dict(inputs)
    for name, new in ((IDS, token), (MASK, 1)):
        if name in inputs:
            grown[name] = nn.functional.pad(inputs[name], (0, 1), value=new)
    for name, value in inputs.items():
        if name not in (IDS, MASK) and value.ndim > 1 and value.shape[1] == length:
            raise ConfigError(
                f"full_token does not know how input '{name}', {tuple(value.shape)}, goes on with a new token; let the "
                "task derive it from the tokens, or use first_token."
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
    if found is None:
        raise ConfigError(
            f"full_token must know which token ends an answer, and {type(model).__name__} does not say. Set the "
            "objective's eos_token_id; an empty list means that answers end at max_new_tokens alone."
        )
    return frozenset([found] if isinstance(found, int) else found)
