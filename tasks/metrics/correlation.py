"""Pearson's and Spearman's correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.errors import ShapeError


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
