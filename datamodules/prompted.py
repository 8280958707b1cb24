"""A text task put into words, for a decoder that goes on writing: prompt in, answer out, whatever the label was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.base import IGNORED, TARGET, LabelledDataset, Sample, Split, TaskDataModule
from datamodules.text import Record, TextDataModule
from datamodules.tokenizer import load_tokenizer
from nscmerge.errors import ConfigError

TEXT = "{text}"


class PromptedText(LabelledDataset):
    """``input_ids`` and ``attention_mask`` of the prompt, int64 and unpadded; ``target`` a list of the one answer.

    Args:
        records: Texts with their labels.
        template: The prompt, with ``{text}`` once.
        answers: The answer to label 0, 1, ...; none writes the label as a number with one decimal.
        tokenizer: Of the decoder.
        max_length: Tokens of a text at most; the words around it are never cut.
    """

    def __init__(
        self, records: Sequence[Record], template: str, answers: Sequence[str], tokenizer: Any, max_length: int
    ) -> None:
        self.records, self.answers = records, answers
        self.tokenizer, self.max_length = tokenizer, max_length
        self.before, self.after = (self._tokens(part) for part in template.split(TEXT))

    def __len__(self) -> int:
        return len(self.records)

    def prompt(self, index: int) -> list[int]:
        """Return the tokens of one prompt."""
        text, _ = self.records[index]
        if isinstance(text, tuple):
            text = "\n".join(text)
        return [*self.before, *self._tokens(text)[: self.max_length], *self.after]

    def answer(self, index: int) -> str:
        """Return the text of one answer, which begins with a blank."""
        _, label = self.records[index]
        return f" {self.answers[int(label)]}" if self.answers else f" {label:.1f}"

    def inputs(self, index: int) -> Sample:
        """Return one prompt."""
        return _inputs(self.prompt(index))

    def target(self, index: int) -> list[str]:  # type: ignore[override]
        """Return the texts that count as right: one."""
        return [self.answer(index)]

    def supervised(self, index: int) -> Sample:
        """Return prompt, answer and end in one, and the labels of the last two."""
        prompt = self.prompt(index)
        answer = [*self._tokens(self.answer(index)), self.tokenizer.eos_token_id]
        labels = torch.tensor([IGNORED] * len(prompt) + answer)
        return {**_inputs([*prompt, *answer]), TARGET: labels}

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


class WithAnswers(Dataset[Sample]):
    """The same samples as a training sees them."""

    def __init__(self, scored: PromptedText) -> None:
        self.scored = scored

    def __len__(self) -> int:
        return len(self.scored)

    def __getitem__(self, index: int) -> Sample:
        return self.scored.supervised(index)


class PromptedDataModule(TaskDataModule):
    r"""A text task as prompts and answers; splits and samples are those of the task itself.

    Args:
        data: The task: texts, labels and splits; its own tokenizer is not used.
        template: The prompt, with ``{text}`` once, such as ``"{text}\nTopic:"``. A blank begins the answer.
        tokenizer: Folder or hub id of the decoder's tokenizer.
        answers: The answer to label 0, 1, ...; None writes the label as a number with one decimal.
        max_length: Tokens of a text at most.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: The template does not hold ``{text}`` once.
    """

    def __init__(
        self,
        data: TextDataModule,
        template: str,
        tokenizer: str,
        answers: list[str] | None = None,
        max_length: int = 96,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if template.count(TEXT) != 1:
            raise ConfigError(f"template {template!r} must hold {TEXT} exactly once, where the text goes.")
        self.data, self.template, self.tokenizer = data, template, tokenizer
        self.answers, self.max_length = list(answers or ()), max_length
        self._splits: dict[Split, PromptedText] = {}

    def prepare_data(self) -> None:
        """Fetch what the task needs."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read and split the task's texts once; they are tokenised as they are asked for."""
        if self._splits:
            return
        tokenizer = load_tokenizer(self.tokenizer)
        self._splits = {
            split: PromptedText(records, self.template, self.answers, tokenizer, self.max_length)
            for split, records in self.data.splits().items()
        }

    def dataset(self, split: Split) -> PromptedText:
        """Return the prompts of one split.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        if split not in self._splits:
            raise ConfigError(f"the '{split}' split of {type(self.data).__name__} is not read yet; call setup() first.")
        return self._splits[split]

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return one split with the answers among the inputs."""
        return WithAnswers(self.dataset(split))

    def describe(self) -> dict[str, Any]:
        """Return the prompt and the answers."""
        return {"template": self.template, "answers": self.answers, "max_length": self.max_length}


def _inputs(tokens: list[int]) -> Sample:
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.ones(len(tokens), dtype=torch.int64)}
