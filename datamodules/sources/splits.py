"""Cutting one published split in two: the two rules that the papers' numbers were made with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from nscmerge.errors import ConfigError


class Cut(Protocol):
    """A rule that divides row numbers into two parts, by their count alone."""

    def indices(self, rows: int) -> tuple[list[int], list[int]]:
        """Return the row numbers of both parts, disjoint and together all of them."""


@dataclass(frozen=True)
class TrainTestSplit:
    """What ``datasets.Dataset.train_test_split`` returns, as (its "train", its "test").

    NSC's code names the halves against their use: its NLI tasks validate on the part called "test" and test on the one
    called "train"; its vision-language tasks do not. Equal to `datasets` 5.2 on every golden.

    Attributes:
        test_size: Share of the rows that "test" gets, rounded up to whole rows; in (0, 1).
        shuffle: Permute the rows; without, "train" is the head and "test" the tail.
        seed: Of numpy's default generator.
    """

    test_size: float
    shuffle: bool = True
    seed: int = 42

    def indices(self, rows: int) -> tuple[list[int], list[int]]:
        """Return the row numbers of "train" and of "test", in the order in which the parts list them."""
        test = math.ceil(self.test_size * rows)
        _check_parts(rows, rows - test, test)
        if not self.shuffle:
            return list(range(rows - test)), list(range(rows - test, rows))
        order = np.random.default_rng(self.seed).permutation(rows).tolist()
        return order[test:], order[:test]


@dataclass(frozen=True)
class RandomSplit:
    """What ``torch.utils.data.random_split`` returns for (all but the fraction, the fraction).

    FusionBench makes the validation sets of its tasks so, with 0.1 and seed 0; NSC's CLIP code too, but takes at most
    5,000.

    Attributes:
        fraction: Share of the rows that the second part gets, rounded down; in (0, 1).
        seed: Of torch's generator.
        at_most: Upper bound of the second part's rows; None sets none.
    """

    fraction: float = 0.1
    seed: int = 0
    at_most: int | None = None

    def indices(self, rows: int) -> tuple[list[int], list[int]]:
        """Return the row numbers of the first and the second part."""
        second = int(rows * self.fraction)
        second = second if self.at_most is None else min(second, self.at_most)
        _check_parts(rows, rows - second, second)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order[: rows - second], order[rows - second :]


def _check_parts(rows: int, first: int, second: int) -> None:
    if first < 1 or second < 1:
        raise ConfigError(f"{rows} rows cannot be cut into parts of {first} and {second}; both need at least one row.")
