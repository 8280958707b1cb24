"""Answers that name one of several choices: IconQA, ImageNet as naming, ScienceQA."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nscmerge.errors import ConfigError, DataError
from tasks.metrics.answers import AnswerMetric

#: Letters of the choices of ScienceQA.
LETTERS = "ABCDE"


def iconqa_accuracy(prediction: str, answer: str) -> float:
    """Return 1.0 if the text is the answer, or a capital letter and a period that begin the text are; else 0.0.

    Case does not count; blanks around the answer do not, around the prediction they do. As in the NSC release.
    """
    answer = answer.strip().lower()
    letter = len(prediction) >= 2 and prediction[0].isupper() and prediction[1] == "."
    return float(prediction.lower() == answer or (letter and prediction[0].lower() == answer))


def strict_iconqa_accuracy(prediction: str, answer: str) -> float:
    """Return 1.0 if text and answer are equal but for case, else 0.0: the rule of MM-MergeBench."""
    return float(prediction.upper() == answer.upper())


def imagenet_naming_accuracy(prediction: str, answer: str, strict: bool = False) -> float:
    """Return 1.0 if the name is in the text or the text in the name, but for case, else 0.0.

    The rule of MM-MergeBench, by which an empty text is right; ``strict`` counts a blank text as wrong.
    """
    if strict and not prediction.strip():
        return 0.0
    prediction, answer = prediction.upper(), answer.upper()
    return float(answer in prediction or prediction in answer)


def scienceqa_choice(prediction: str, choices: int = len(LETTERS)) -> int:
    """Return the index of the choice that a text names, -1 if it names none.

    In this order: the text is a letter from A to E; it begins with one, a period and a blank; it says "The answer is",
    a capital and one more character exactly once.

    Args:
        prediction: Generated text.
        choices: Number of choices of the question; a letter beyond them names none.

    Raises:
        ConfigError: Not 1 to 5 choices.
    """
    if not 1 <= choices <= len(LETTERS):
        raise ConfigError(f"{choices} choices; ScienceQA has 1 to {len(LETTERS)}, {LETTERS[0]} to {LETTERS[-1]}.")
    if len(prediction) == 1:
        letter = prediction
    elif prediction[1:3] == ". " and prediction[0] in LETTERS:
        letter = prediction[0]
    else:
        said = re.findall(r"The answer is ([A-Z]).", prediction)  # any character may follow, as published
        letter = said[0] if len(said) == 1 else ""
    return LETTERS[:choices].find(letter) if letter else -1


def scienceqa_accuracy(prediction: str, answer: int, choices: int = len(LETTERS)) -> float:
    """Return 1.0 if the text names this choice by its letter, else 0.0; args and errors as :func:`scienceqa_choice`."""
    return float(scienceqa_choice(prediction, choices) == answer)


class IconQAAccuracy(AnswerMetric):
    """Mean of :func:`iconqa_accuracy` over many batches and processes; any accepted answer will do."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return the best :func:`iconqa_accuracy` of one text."""
        return max(iconqa_accuracy(prediction, answer) for answer in target)


class StrictIconQAAccuracy(AnswerMetric):
    """Mean of :func:`strict_iconqa_accuracy` over many batches and processes; any accepted answer will do."""

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return the best :func:`strict_iconqa_accuracy` of one text."""
        return max(strict_iconqa_accuracy(prediction, answer) for answer in target)


class ImageNetNamingAccuracy(AnswerMetric):
    """Mean of :func:`imagenet_naming_accuracy` over many batches and processes; any accepted name will do.

    Args:
        strict: Count a blank text as wrong; the published rule counts it as right.
    """

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return the best :func:`imagenet_naming_accuracy` of one text."""
        return max(imagenet_naming_accuracy(prediction, answer, self.strict) for answer in target)


class ScienceQAAccuracy(AnswerMetric):
    """Mean of :func:`scienceqa_accuracy` over many batches and processes; targets name the right choice, ``["B"]``.

    A target may be written in any way that a prediction may. The number of choices is not needed: a letter beyond them
    is never the right one.
    """

    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return :func:`scienceqa_accuracy` of one text and the first of its answers.

        Raises:
            DataError: The target names no choice from A to E.
        """
        right = scienceqa_choice(target[0])
        if right < 0:
            raise DataError(
                f"the answer {target[0]!r} of a ScienceQA sample names no choice; expected a letter from {LETTERS[0]} "
                f"to {LETTERS[-1]}. Check the records that the data module read."
            )
        return scienceqa_accuracy(prediction, right)
