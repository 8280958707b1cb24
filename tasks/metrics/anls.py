"""Average normalized Levenshtein similarity of short answers (DocVQA)."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.metrics.answers import AnswerMetric, check_pairs

#: Similarities below it count as 0.
THRESHOLD = 0.5


def levenshtein(a: str, b: str) -> int:
    """Return the smallest number of single-character insertions, deletions, replacements from ``a`` to ``b``."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity in [0, 1] of a text to the closest accepted answer; below 0.5 it counts as 0.

    Distances are taken of lower-cased texts with single blanks, but divided by the length of the longer upper-cased one
    as it came, as in the released evaluation codes. Exactly 0.5 stays 0.5 there; the formula in the paper on ST-VQA
    (arXiv:1905.13648) makes it 0.

    Args:
        prediction: Generated text; empty equals an empty answer only.
        answers: Accepted answers, at least one.

    Raises:
        DataError: No accepted answer.
    """
    check_pairs([prediction], [answers])
    similarity = max(_similarity(prediction, answer) for answer in answers)
    return similarity if similarity >= THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    if length == 0:
        return 1.0
    a, b = (" ".join(text.strip().lower().split()) for text in (answer, prediction))
    if 1 - abs(len(a) - len(b)) / length < THRESHOLD:  # no closer than this, whatever the letters
        return 0.0
    return 1 - levenshtein(a, b) / length


class ANLS(AnswerMetric):
    """Mean of :func:`anls` over many batches and processes."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return :func:`anls` of one text."""
        return anls(prediction, target)
