"""Pearson's and Spearman's correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nscmerge.errors import ShapeError
from tasks.metrics.answers import CorpusMetric


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's r, in [-1, 1]; NaN where a side is constant or has fewer than two samples.

    The class for many batches is ``torchmetrics.PearsonCorrCoef``.

    Args:
        x: (N,), any real dtype or a list; y: the same.
        y: (N,).

    Raises:
        ShapeError: The two are not vectors of one length.
    """
    x, y = _vectors(x, y)
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))).clamp(-1, 1)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Return Spearman's rho: Pearson's r of the ranks, tied values sharing the average of theirs.

    The class for many batches is ``torchmetrics.SpearmanCorrCoef``. Args, range and errors as :func:`pearson`.
    """
    x, y = _vectors(x, y)
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(x: Tensor) -> Tensor:
    """Return ranks from 1 to N, fp64 (N,); equal values get the mean of the ranks that they cover."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # the highest rank in each group of equal values
    return (last - (counts.double() - 1) / 2)[group]


def _vectors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ShapeError(f"x is {tuple(x.shape)}, y {tuple(y.shape)}; a correlation needs two vectors of one length.")
    return x, y


def text_spearman(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """Return Spearman's rho of the numbers that texts spell (STS-B of Flan-T5 on GLUE), in [-1, 1], fp64.

    A text that is no number counts as 0.0, as in FusionBench; so does "nan", which would undo every other answer there.
    Where there is no correlation, as of constant predictions, it is 0; NaN without samples.

    Args:
        predictions: Generated texts, N.
        targets: True values as texts, N.
    """
    rho = spearman(*([_number(text) for text in texts] for texts in (predictions, targets)))
    return torch.nan_to_num(rho, nan=0.0 if len(predictions) else torch.nan)


class TextSpearman(CorpusMetric):
    """:func:`text_spearman` over many batches and processes, against each sample's first answer."""

    def compute(self) -> Tensor:
        """Return rho in [-1, 1], fp64 scalar."""
        predictions, targets = self.gathered()
        return text_spearman(predictions, [target[0] for target in targets])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return 0.0 if math.isnan(value) else value
