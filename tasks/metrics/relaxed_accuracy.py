"""Accuracy of answers read off a chart, numbers within five percent (ChartQA)."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.metrics.answers import AnswerMetric

#: Largest relative error of a number that counts as right.
TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, target: str) -> float:
    """Return 1.0 for the right answer, else 0.0: numbers may be 5 % off, other texts must be equal but for case.

    Numbers are what Python's ``float`` reads, so blanks around, exponents, underscores and Unicode digits pass and
    thousands commas do not; a percent sign at the end divides by 100. A target of zero is compared as text. Nothing is
    stripped of texts. As in ChartQA (arXiv:2203.10244) and the released evaluation codes, in fp64: 1.05 for 1 is wrong
    by rounding.
    """
    p, t = _number(prediction), _number(target)
    if p is not None and t is not None and t != 0:
        return float(abs(p - t) / abs(t) <= TOLERANCE)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


class RelaxedAccuracy(AnswerMetric):
    """Mean of :func:`relaxed_accuracy` over many batches and processes, against each sample's first answer."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return :func:`relaxed_accuracy` of one text and the first of its answers."""
        return relaxed_accuracy(prediction, target[0])
