"""Six natural-language-inference tasks in one space of three labels: MNLI, QNLI, SNLI, RTE, SICK, SciTail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import LabelledDataset, Sample, Split
from datamodules.sources import Cut, DatasetSpec, LabelMap, Part, Place, Source, Table, TrainTestSplit
from datamodules.sources.module import SourceDataModule
from datamodules.tokenizer import context_length, load_tokenizer
from nscmerge.errors import ConfigError, DataError

#: What the three logits of every task mean.
LABELS = ("entailment", "neutral", "contradiction")
NLITaskName = Literal["mnli", "qnli", "snli", "rte", "sick", "scitail"]

_THREE = LabelMap({name: i for i, name in enumerate(LABELS)}, {0: 0, 1: 1, 2: 2})
#: Two-way tasks leave the middle logit out: what does not follow counts as contradiction.
_TWO = LabelMap({"entailment": 0, "not entailment": 2}, {0: 0, 1: 2})
_SCITAIL = LabelMap({"entails": 0, "neutral": 1}, {}, dropped=frozenset({"contradiction", "contradicts"}))


@dataclass(frozen=True)
class NLITask:
    """One task.

    Attributes:
        spec: Its data set, with the columns ``text_a``, ``text_b`` and ``label``.
        labels: What its labels stand for in ``LABELS``.
        mask_class: The logit that it never uses, if any; for ``SequenceClassification``.
        max_length: Tokens per pair; longer ones are cut.
    """

    spec: DatasetSpec
    labels: LabelMap
    mask_class: int | None = None
    max_length: int = 2000


def _spec(
    name: str, places: list[Place], text_a: tuple[str, ...], text_b: tuple[str, ...], cut: Cut | None, **more: Any
) -> DatasetSpec:
    label = ("label", "entailment_judgment", "gold_label")
    held_out = ("validation", "validation_matched", "dev", "dev_matched", "trial")
    # NSC's code validates on what train_test_split calls "test", and tests on what it calls "train".
    splits: dict[Split, Part] = {
        "train": Part("train"),
        "val": Part(held_out, cut=cut, side=1),
        "test": Part(held_out, cut=cut, side=0) if cut else Part(("test", "test_annotated")),
    }
    return DatasetSpec(name, places, {"text_a": text_a, "text_b": text_b, "label": label}, splits, **more)


def nli_tasks() -> dict[str, NLITask]:
    """Return the six tasks, with the splits that NSC's numbers were made on (shares from KnOTS' configuration)."""
    glue = "nyu-mll/glue"
    pair = ("premise", "sentence1"), ("hypothesis", "sentence2")
    return {
        "mnli": NLITask(
            _spec(
                "MNLI",
                [Place("SetFit/mnli"), Place(glue, "mnli")],
                ("text1", *pair[0]),
                ("text2", *pair[1]),
                TrainTestSplit(0.2, shuffle=False),
            ),
            _THREE,
        ),
        "qnli": NLITask(
            _spec(
                "QNLI",
                [Place("SetFit/qnli"), Place(glue, "qnli")],
                ("text1", "question"),
                ("text2", "sentence"),
                TrainTestSplit(0.2),
            ),
            _TWO,
            mask_class=1,
        ),
        "snli": NLITask(_spec("SNLI", [Place("stanfordnlp/snli")], *pair, None), _THREE),
        "rte": NLITask(
            _spec(
                "RTE",
                [Place("SetFit/rte"), Place(glue, "rte")],
                ("text1", "sentence1"),
                ("text2", "sentence2"),
                TrainTestSplit(0.5),
            ),
            _TWO,
            mask_class=1,
        ),
        "sick": NLITask(
            _spec(
                "SICK",
                [
                    Place("DefenceLab/sick"),
                    Place("RobZamp/sick"),
                    Place("RobZamp/sick", revision="refs/convert/parquet"),
                ],
                ("text_a", "sentence_A"),
                ("text_b", "sentence_B"),
                None,
            ),
            _THREE,
        ),
        "scitail": NLITask(
            _spec(
                "SciTail",
                [
                    Place("allenai/scitail", "tsv_format"),
                    Place("allenai/scitail", "tsv_format", revision="refs/convert/parquet"),
                ],
                *pair,
                None,
                header=("premise", "hypothesis", "label"),
            ),
            _SCITAIL,
            mask_class=2,
            max_length=1000,
        ),
    }


class PairDataset(LabelledDataset):
    """``input_ids`` and ``attention_mask`` of a pair of texts, int64 and unpadded; ``target`` int64, scalar.

    Args:
        table: Rows with ``text_a`` and ``text_b``.
        labels: One index per row.
        tokenizer: Joins the two texts by its own template.
        max_length: Tokens per pair; the longer text is cut first.
    """

    def __init__(self, table: Table, labels: list[int], tokenizer: Any, max_length: int) -> None:
        self.table, self.labels = table, labels
        self.tokenizer, self.max_length = tokenizer, context_length(tokenizer, max_length)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: int) -> Sample:
        """Return one tokenised pair.

        Raises:
            DataError: A text is missing.
        """
        row = self.table[index]
        texts = [row["text_a"], row["text_b"]]
        if None in texts:
            raise DataError(f"{self.table.where}: row {index} of the split has an empty text: {row}. Remove the row.")
        encoded = self.tokenizer(*map(str, texts), truncation=True, max_length=self.max_length)
        return {key: torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask")}

    def target(self, index: int) -> Tensor:
        """Return one label."""
        return torch.tensor(self.labels[index])


class NLIDataModule(SourceDataModule):
    """One of six tasks of sentence pairs, for decoders such as LLaMA; batches are padded right, to their longest.

    MNLI, QNLI and RTE have no labelled test split: 20, 20 and 50 percent of their validation split are ``val``, the
    rest is ``test``. Rows without a label are dropped first. A tokenizer without pad token pads with its end token.

    Args:
        task: ``mnli``, ``qnli``, ``snli``, ``rte``, ``sick`` or ``scitail``.
        tokenizer: Folder or hub id.
        source: Folder, file or hub id of the data; None takes the hub ids of the papers' code and then their fallbacks.
        max_length: Tokens per pair; None takes 2000, and 1000 for SciTail.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: The task is unknown.
    """

    def __init__(
        self,
        task: NLITaskName,
        tokenizer: str,
        source: str | None = None,
        max_length: int | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in get_args(NLITaskName):
            raise ConfigError(f"no NLI task '{task}'; known are {', '.join(get_args(NLITaskName))}.")
        self.task = nli_tasks()[task]
        super().__init__(self.task.spec, source, batch_size, eval_batch_size, num_workers, seed)
        self.tokenizer, self.max_length = tokenizer, max_length or self.task.max_length

    def read(self, opened: Source, split: Split) -> Dataset[Sample]:
        """Return one tokenised split; texts are tokenised as they are asked for."""
        read = self.task.labels.read
        table = opened.split(split, lambda rows: [i for i, label in enumerate(read(rows)) if label is not None])
        labels = [label for label in read(table) if label is not None]
        return PairDataset(table, labels, self._loaded_tokenizer, self.max_length)

    @cached_property
    def _loaded_tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer)
