"""Soft accuracy of answers to visual questions that several people answered (VizWiz, VQA)."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.metrics.answers import AnswerMetric, check_pairs
from tasks.metrics.vqa_normalization import normalize_vqa_answer


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return how many people agree, in [0, 1]: the mean over people of min(1, matches among the others / 3).

    With ten people 1, 2, 3, 4 or more matches give 0.3, 0.6, 0.9, 1.0. Prediction and answers are always normalized;
    the original VQA evaluator does not where all ten are the same. One person alone has no others, which gives 0.

    Args:
        prediction: Generated text.
        answers: One per person, at least one; ten in the published sets.

    Raises:
        DataError: No answer.
    """
    check_pairs([prediction], [answers])
    text = normalize_vqa_answer(prediction)
    same = [normalize_vqa_answer(answer) == text for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


class VQAAccuracy(AnswerMetric):
    """Mean of :func:`vqa_accuracy` over many batches and processes."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return :func:`vqa_accuracy` of one text."""
        return vqa_accuracy(prediction, target)
