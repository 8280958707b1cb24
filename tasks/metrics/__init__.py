"""Metrics as pure functions in fp64; each has a ``torchmetrics`` class of the same meaning for batches and processes.

Ours is beside the function where torchmetrics has none; otherwise theirs is named in the docstring and used as it is.
"""

from tasks.metrics.accuracy import accuracy
from tasks.metrics.correlation import pearson, spearman
from tasks.metrics.normalized import normalized_score
from tasks.metrics.rmse import RMSE, rmse

__all__ = ["RMSE", "accuracy", "normalized_score", "pearson", "rmse", "spearman"]
