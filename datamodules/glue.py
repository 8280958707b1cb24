"""GLUE as text to text, in the words that FusionBench's Flan-T5 models were fine-tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch.utils.data import Dataset

from datamodules.base import TARGET, LabelledDataset, Sample, Split
from datamodules.sources import DatasetSpec, LabelMap, Part, Place, RandomSplit, Source, Table
from datamodules.sources.module import SourceDataModule
from datamodules.tokenizer import context_length, load_tokenizer
from nscmerge.errors import ConfigError, DataError

GLUETaskName = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
#: What a decoder starts from: T5 takes the pad token.
DECODER_IDS = "decoder_input_ids"


@dataclass(frozen=True)
class GLUETask:
    """One task as text to text.

    Attributes:
        spec: Its data set: the columns that ``template`` names, and ``label``.
        template: The input text.
        answers: The target text of every label; none for a score, which is written with one decimal.
        labels: What the published labels stand for in ``answers``; None for a score.
    """

    spec: DatasetSpec
    template: str
    answers: tuple[str, ...] = ()
    labels: LabelMap | None = None

    def text(self, row: dict[str, Any]) -> str:
        """Return a row's input text."""
        return self.template.format(**row)

    def targets(self, table: Table) -> list[str | None]:
        """Return the target text of every row, None where it has no label.

        Raises:
            DataError: A label is unknown, or a score is no number.
        """
        if self.labels is not None:
            return [None if i is None else self.answers[i] for i in self.labels.read(table)]
        return [_score(value, table.where) for value in table.column("label")]


def glue_tasks() -> dict[str, GLUETask]:
    """Return the eight tasks; the misspelt words in the templates are the published ones."""
    one, two, questions = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
    # Task: columns, template, answer to label 0, 1, ..., and what the published labels are called.
    table: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
        "cola": (
            one,
            'Indicate if the following sentence is grammatically correct or not: "{sentence}". '
            "Answere 'acceptable' or 'unacceptable'.",
            ("unacceptable", "acceptable"),
            ("unacceptable", "acceptable"),
        ),
        "mnli": (
            ("premise", "hypothesis"),
            "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: "
            "'{hypothesis}'? Answere with 'entailment', 'contradiction', or 'neutral'.",
            ("entailment", "neutral", "contradiction"),
            ("entailment", "neutral", "contradiction"),
        ),
        "mrpc": (
            two,
            "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? "
            "Answere with 'yes' or 'no'.",
            ("no", "yes"),
            ("not_equivalent", "equivalent"),
        ),
        "qnli": (
            ("question", "sentence"),
            "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
            "provided? Answer with 'yes' or 'no'.",
            ("yes", "no"),
            ("entailment", "not_entailment"),
        ),
        "qqp": (
            questions,
            "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.",
            ("no", "yes"),
            ("not_duplicate", "duplicate"),
        ),
        "rte": (
            two,
            "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
            ("yes", "no"),
            ("entailment", "not_entailment"),
        ),
        "sst2": (
            one,
            "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
            ("negative", "positive"),
            ("negative", "positive"),
        ),
        "stsb": (
            two,
            "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
            "(completely similar), rate the similarity.",
            (),
            (),
        ),
    }
    return {key: _task(key, *row) for key, row in table.items()}


class TextToTextDataset(LabelledDataset):
    """``input_ids`` and ``attention_mask`` of the input text, int64 and unpadded; ``target`` a list of one text.

    Args:
        table: Rows with the columns of the task's template.
        targets: The target text of every row.
        task: Says what the input text is.
        tokenizer: A tokenizer that ends a text by itself, as T5's does.
        max_length: Tokens per text; longer ones are cut.
    """

    def __init__(self, table: Table, targets: list[str], task: GLUETask, tokenizer: Any, max_length: int) -> None:
        self.table, self.targets, self.task = table, targets, task
        self.tokenizer, self.max_length = tokenizer, context_length(tokenizer, max_length)

    def __len__(self) -> int:
        return len(self.targets)

    def inputs(self, index: int) -> Sample:
        """Return one tokenised input text.

        Raises:
            DataError: A text of the row is missing.
        """
        row = self.table[index]
        if missing := [name for name, value in row.items() if value is None]:
            raise DataError(f"{self.table.where}: row {index} of the split has no {missing[0]}: {row}. Remove the row.")
        encoded = self.encode(self.task.text(row))
        return {key: torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask")}

    def target(self, index: int) -> list[str]:  # type: ignore[override]
        """Return the texts that count as right: one."""
        return [self.targets[index]]

    def encode(self, text: str) -> Any:
        """Return what the tokenizer makes of one text."""
        return self.tokenizer(text, truncation=True, max_length=self.max_length)


class WithDecoderInputs(Dataset[Sample]):
    """The same samples as a training sees them: ``target`` int64 tokens, ``decoder_input_ids`` the tokens before."""

    def __init__(self, scored: TextToTextDataset) -> None:
        self.scored = scored

    def __len__(self) -> int:
        return len(self.scored)

    def __getitem__(self, index: int) -> Sample:
        answer = self.scored.encode(self.scored.targets[index])["input_ids"]
        start = self.scored.tokenizer.pad_token_id
        return {
            **self.scored.inputs(index),
            DECODER_IDS: torch.tensor([start, *answer[:-1]]),
            TARGET: torch.tensor(answer),
        }


class GLUEDataModule(SourceDataModule):
    """One GLUE task as text to text, for encoder-decoders such as Flan-T5.

    ``test`` is the published validation split (MNLI: the matched one). GLUE has no second labelled split, so ``val`` is
    the last tenth of a seeded permutation of the training split and ``train`` the rest, as FusionBench makes the
    validation sets of other suites. Rows without a label are dropped first.

    Args:
        task: ``cola``, ``mnli``, ``mrpc``, ``qnli``, ``qqp``, ``rte``, ``sst2`` or ``stsb``.
        tokenizer: Folder or hub id.
        source: Folder, file or hub id of the data; None takes ``nyu-mll/glue``.
        max_length: Tokens per input and per target; the reference takes the model's limit.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: The task is unknown.
    """

    def __init__(
        self,
        task: GLUETaskName,
        tokenizer: str,
        source: str | None = None,
        max_length: int = 512,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in get_args(GLUETaskName):
            raise ConfigError(f"no GLUE task '{task}'; known are {', '.join(get_args(GLUETaskName))}.")
        self.task = glue_tasks()[task]
        super().__init__(self.task.spec, source, batch_size, eval_batch_size, num_workers, seed)
        self.tokenizer, self.max_length = tokenizer, max_length

    def read(self, opened: Source, split: Split) -> TextToTextDataset:
        """Return one split; texts are tokenised as they are asked for."""
        targets = self.task.targets
        table = opened.split(split, lambda rows: [i for i, text in enumerate(targets(rows)) if text is not None])
        texts = [text for text in targets(table) if text is not None]
        return TextToTextDataset(table, texts, self.task, self._loaded_tokenizer, self.max_length)

    @cached_property
    def _loaded_tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer)

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return one split with the target as tokens, among the decoder's inputs too."""
        return WithDecoderInputs(cast(TextToTextDataset, self.dataset(split)))


def _task(
    key: str, columns: tuple[str, ...], template: str, answers: tuple[str, ...], names: tuple[str, ...]
) -> GLUETask:
    held_out = RandomSplit(0.1, seed=0)
    splits: dict[Split, Part] = {
        "train": Part("train", cut=held_out, side=0),
        "val": Part("train", cut=held_out, side=1),
        "test": Part(("validation", "validation_matched")),
    }
    shown = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}.get(key, key.upper())
    spec = DatasetSpec(
        f"GLUE {shown}",
        [Place("nyu-mll/glue", key), Place("glue", key)],
        {**{column: column for column in columns}, "label": "label"},
        splits,
    )
    numbers = range(len(names))
    labels = LabelMap(dict(zip(names, numbers, strict=True)), dict(zip(numbers, numbers, strict=True)))
    return GLUETask(spec, template, answers, labels if names else None)


def _score(value: Any, where: str) -> str | None:
    """Return a similarity with one decimal; published rows without a label have -1."""
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: column 'label' holds {value!r}; expected a score from 0 to 5.") from error
    return f"{score:.1f}" if score >= 0 else None  # NaN, too, is no score
