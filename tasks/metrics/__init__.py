"""Metrics as pure functions in fp64; each has a ``torchmetrics`` class of the same meaning for batches and processes.

Ours is beside the function where torchmetrics has none; otherwise theirs is named in the docstring and used as it is.
Classes of dense tasks take ``update(prediction, target)`` in the form that the task predicts; those of generated text
take N texts and N lists of accepted answers or references.
"""

from tasks.metrics.accuracy import accuracy
from tasks.metrics.angular import MeanAngularError, mean_angular_error
from tasks.metrics.anls import ANLS, anls
from tasks.metrics.answers import EmptyAnswers
from tasks.metrics.caption_mean7 import CaptionMean7, caption_mean7, caption_scores
from tasks.metrics.cider import CIDEr, cider, cider_scores
from tasks.metrics.continual import average_accuracy, backward_transfer
from tasks.metrics.correlation import TextSpearman, pearson, spearman, text_spearman
from tasks.metrics.edge_loss import EdgeReferenceLoss, edge_reference_loss
from tasks.metrics.exact_match import ExactMatch, exact_match
from tasks.metrics.l1 import L1, l1
from tasks.metrics.mean_iou import MeanIoU, mean_iou
from tasks.metrics.multiple_choice import (
    IconQAAccuracy,
    ImageNetNamingAccuracy,
    ScienceQAAccuracy,
    StrictIconQAAccuracy,
    iconqa_accuracy,
    imagenet_naming_accuracy,
    scienceqa_accuracy,
    scienceqa_choice,
    strict_iconqa_accuracy,
)
from tasks.metrics.normalized import normalized_score
from tasks.metrics.ods_f import EdgeAveragePrecision, OdsF, OisF, edge_scores, ods_f
from tasks.metrics.ptb import choose_ptb, ptb_note, ptb_tokenize
from tasks.metrics.relaxed_accuracy import RelaxedAccuracy, relaxed_accuracy
from tasks.metrics.rmse import MSE, RMSE, mse, rmse
from tasks.metrics.saliency import (
    SaliencyMaxF,
    SaliencyMaxFDoubleSigmoid,
    SaliencyMIoU,
    saliency_max_f,
    saliency_max_f_double_sigmoid,
    saliency_miou,
)
from tasks.metrics.vqa_accuracy import VQAAccuracy, vqa_accuracy
from tasks.metrics.vqa_normalization import normalize_vqa_answer

__all__ = [
    "ANLS",
    "L1",
    "MSE",
    "RMSE",
    "CIDEr",
    "CaptionMean7",
    "EdgeAveragePrecision",
    "EdgeReferenceLoss",
    "EmptyAnswers",
    "ExactMatch",
    "IconQAAccuracy",
    "ImageNetNamingAccuracy",
    "MeanAngularError",
    "MeanIoU",
    "OdsF",
    "OisF",
    "RelaxedAccuracy",
    "SaliencyMIoU",
    "SaliencyMaxF",
    "SaliencyMaxFDoubleSigmoid",
    "ScienceQAAccuracy",
    "StrictIconQAAccuracy",
    "TextSpearman",
    "VQAAccuracy",
    "accuracy",
    "anls",
    "average_accuracy",
    "backward_transfer",
    "caption_mean7",
    "caption_scores",
    "choose_ptb",
    "cider",
    "cider_scores",
    "edge_reference_loss",
    "edge_scores",
    "exact_match",
    "iconqa_accuracy",
    "imagenet_naming_accuracy",
    "l1",
    "mean_angular_error",
    "mean_iou",
    "mse",
    "normalize_vqa_answer",
    "normalized_score",
    "ods_f",
    "pearson",
    "ptb_note",
    "ptb_tokenize",
    "relaxed_accuracy",
    "rmse",
    "saliency_max_f",
    "saliency_max_f_double_sigmoid",
    "saliency_miou",
    "scienceqa_accuracy",
    "scienceqa_choice",
    "spearman",
    "strict_iconqa_accuracy",
    "text_spearman",
    "vqa_accuracy",
]
