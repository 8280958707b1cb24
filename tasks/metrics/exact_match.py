"""Share of generated texts that equal the answer, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.metrics.answers import AnswerMetric


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the text equals one of the accepted answers, without any clean-up, else 0.0.

    The score of Flan-T5 on GLUE (FusionBench), for CoLA and the tasks that GLUE scores by F1 as well.
    """
    return float(prediction in list(answers))


class ExactMatch(AnswerMetric):
    """Mean of :func:`exact_match` over many batches and processes."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return :func:`exact_match` of one text."""
        return exact_match(prediction, target)
