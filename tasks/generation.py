"""Tasks whose answer is a text: trained token by token with the right answer in sight, scored on what is generated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError, DataError
from tasks.base import Task
from tasks.metrics import EmptyAnswers

#: Token labels that no loss counts.
IGNORED = -100


def left_padded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with all padding before the tokens, where a decoder that goes on writing needs it.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, (N, T), padded on either side; others are left as they are.
    """
    mask = inputs.get("attention_mask")
    if mask is None or bool((mask[:, -1] != 0).all()):
        return dict(inputs)
    # A stable sort by validity moves the padding to the front and keeps the order of the tokens.
    order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True)
    moved = {k: v.gather(1, order) if v.shape == mask.shape else v for k, v in inputs.items()}
    return moved


class GreedyAnswers(nn.Module):
    """Called as ``answers(model, inputs)``: the texts that the model writes, most likely token by token, one beam.

    Only the new tokens are decoded, without special tokens, and nothing is stripped or cleaned up.

    Args:
        tokenizer: To decode with.
        max_new_tokens: Tokens at most.
    """

    def __init__(self, tokenizer: Any, max_new_tokens: int) -> None:
        super().__init__()
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens

    @torch.no_grad()
    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return one text per sample, empty where the model ended at once."""
        with_encoder = model.config.is_encoder_decoder
        given = dict(inputs) if with_encoder else left_padded(inputs)
        given.pop("decoder_input_ids", None)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        own = model.generation_config.eos_token_id  # type: ignore[union-attr]
        # What a training appends is the tokenizer's; a checkpoint may name others beside it, or another one.
        ends = {eos, *(own if isinstance(own, list) else [own])} - {None}
        tokens = model.generate(  # type: ignore[operator]
            **given,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            # A checkpoint's own sampling settings would be warned of; they mean nothing here.
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=eos if pad is None else pad,
            eos_token_id=sorted(ends) or None,
        )
        # A decoder of its own starts with one token that is no answer; otherwise the prompt comes first.
        start = 1 if with_encoder else given["input_ids"].shape[1]
        texts: list[str] = self.tokenizer.batch_decode(
            tokens[:, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts


class TokenAccuracy(Metric):
    """Share of answer tokens that are the most likely ones given the right answer so far; for curves of a training.

    Args:
        shift: Whether position t predicts the label at t + 1, as in a decoder, or the one at t.
    """

    full_state_update, higher_is_better = False, True

    def __init__(self, shift: bool = True) -> None:
        super().__init__()
        self.shift = shift
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits, (N, T, V), and token labels, (N, T), -100 where none counts."""
        prediction, target = aligned(prediction, target, self.shift)
        counts = target != IGNORED
        self.correct += (prediction.argmax(-1) == target)[counts].sum()
        self.total += counts.sum()

    def compute(self) -> Tensor:
        """Return the share, fp64 scalar; NaN without tokens."""
        return self.correct.double() / self.total


def aligned(prediction: Tensor, target: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Return logits and labels of which position t belongs to position t.

    Raises:
        DataError: Logits and labels have different lengths.
    """
    if prediction.shape[:2] != target.shape:
        raise DataError(
            f"logits at {tuple(prediction.shape[:2])} positions, labels at {tuple(target.shape)}; expected the same. "
            "Train on supervised samples, whose target is one label per token."
        )
    return (prediction[:, :-1], target[:, 1:]) if shift else (prediction, target)


class Generation(Task):
    """Cross entropy of the answer's tokens; the scores are those of greedy answers. A subclass states the metric.

    There is no head: what an expert learned is all in its adapter.

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the answers; the base model's.
        max_new_tokens: Length of an answer at most.

    Raises:
        ConfigError: ``max_new_tokens`` is not positive.
    """

    outputs = "tokens"
    #: Whether position t predicts the label at t + 1.
    shift = True

    def __init__(self, tokenizer: str, max_new_tokens: int = 128) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; an answer needs at least one token.")
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model cannot generate."""
        if not getattr(model, "can_generate", lambda: False)():
            raise ConfigError(
                f"{type(model).__name__} has no language head, and {type(self).__name__} scores what a model writes. "
                "Load the base model as AutoModelForCausalLM, AutoModelForSeq2SeqLM or AutoModelForImageTextToText "
                "(base_model.init_args.model_class)."
            )

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the next-token logits at every position, (N, T, V)."""
        logits: Tensor = model(**inputs).logits
        return logits

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits as they are: the model's own head is everybody's."""
        return features

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy of the answer's tokens, in nats, in fp32.

        Raises:
            DataError: No token of the batch counts.
        """
        prediction, target = aligned(prediction, target, self.shift)
        if not bool((target != IGNORED).any()):
            raise DataError(
                "no token of a batch belongs to an answer, so there is nothing to learn; were prompts cut before "
                "their answers? Raise the data module's max_length."
            )
        return nn.functional.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED)

    def evaluator(self) -> nn.Module:
        """Return what writes the answers that :meth:`metrics` score."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve_source(self.tokenizer))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tokenizer '{self.tokenizer}' cannot be loaded ({str(error).splitlines()[0]}). "
                "Set the task's tokenizer to the base model's folder or hub id."
            ) from error
        return GreedyAnswers(tokenizer, self.max_new_tokens)

    def notes(self) -> list[str]:
        """Return how answers were made."""
        return [f"answers are greedy, at most {self.max_new_tokens} new tokens, nothing stripped"]

    @abstractmethod
    def score(self) -> dict[str, Metric]:
        """Return new metrics over ``(predictions: list[str], targets: list[list[str]])`` by name."""

    def metrics(self) -> MetricCollection:
        """Return the task's metrics and ``empty_answers``, how many answers have no text."""
        return MetricCollection({**self.score(), "empty_answers": EmptyAnswers()}, compute_groups=False)

    def validation_metrics(self) -> MetricCollection:
        """Return ``token_accuracy``: to generate in every validation takes too long."""
        return MetricCollection({"token_accuracy": TokenAccuracy(self.shift)})
