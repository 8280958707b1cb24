"""Metrics as pure functions in fp64; each has a ``torchmetrics`` class of the same meaning for batches and processes.

Ours is beside the function where torchmetrics has none; otherwise theirs is named in the docstring and used as it is.
Classes of dense tasks take ``update(prediction, target)`` in the form that the task predicts.
"""

from tasks.metrics.accuracy import accuracy
from tasks.metrics.angular import MeanAngularError, mean_angular_error
from tasks.metrics.correlation import pearson, spearman
from tasks.metrics.edge_loss import EdgeReferenceLoss, edge_reference_loss
from tasks.metrics.l1 import L1, l1
from tasks.metrics.mean_iou import MeanIoU, mean_iou
from tasks.metrics.normalized import normalized_score
from tasks.metrics.ods_f import EdgeAveragePrecision, OdsF, OisF, edge_scores, ods_f
from tasks.metrics.rmse import MSE, RMSE, mse, rmse
from tasks.metrics.saliency import (
    SaliencyMaxF,
    SaliencyMaxFDoubleSigmoid,
    SaliencyMIoU,
    saliency_max_f,
    saliency_max_f_double_sigmoid,
    saliency_miou,
)

__all__ = [
    "L1",
    "MSE",
    "RMSE",
    "EdgeAveragePrecision",
    "EdgeReferenceLoss",
    "MeanAngularError",
    "MeanIoU",
    "OdsF",
    "OisF",
    "SaliencyMIoU",
    "SaliencyMaxF",
    "SaliencyMaxFDoubleSigmoid",
    "accuracy",
    "edge_reference_loss",
    "edge_scores",
    "l1",
    "mean_angular_error",
    "mean_iou",
    "mse",
    "normalized_score",
    "ods_f",
    "pearson",
    "rmse",
    "saliency_max_f",
    "saliency_max_f_double_sigmoid",
    "saliency_miou",
    "spearman",
]
