"""Questions about images, answered in a few words: VizWiz, IconQA, ChartQA, DocVQA as NSC measures them.

Which metric belongs to which data set: NSC's evaluation (arXiv:2603.26317 calls all four accuracies).
"""

from __future__ import annotations

from torchmetrics import Metric

from tasks.generation import Generation
from tasks.metrics import ANLS, IconQAAccuracy, RelaxedAccuracy, VQAAccuracy


class VizWizVQA(Generation):
    """``vqa_accuracy``: how many of the ten annotators agree, normalised answers, in [0, 1]."""

    primary, higher_is_better = "vqa_accuracy", True

    def score(self) -> dict[str, Metric]:
        """Return the soft VQA accuracy."""
        return {self.primary: VQAAccuracy()}


class IconQA(Generation):
    """``accuracy``: the answer's text but for case, or its letter before a full stop, in [0, 1]."""

    primary, higher_is_better = "accuracy", True

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: IconQAAccuracy()}


class ChartQA(Generation):
    """``relaxed_accuracy``: numbers within 5 percent, other answers equal but for case, in [0, 1]."""

    primary, higher_is_better = "relaxed_accuracy", True

    def score(self) -> dict[str, Metric]:
        """Return the relaxed accuracy."""
        return {self.primary: RelaxedAccuracy()}


class DocVQA(Generation):
    """``anls``: average normalised Levenshtein similarity to the nearest accepted answer, in [0, 1]."""

    primary, higher_is_better = "anls", True

    def score(self) -> dict[str, Metric]:
        """Return ANLS."""
        return {self.primary: ANLS()}
