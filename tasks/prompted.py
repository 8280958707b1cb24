"""Tasks that a decoder answers in words after a prompt: classification by name, regression by a number's text."""

from __future__ import annotations

from torchmetrics import Metric

from tasks.generation import Generation
from tasks.metrics import ExactMatch, TextSpearman


class PromptedClassification(Generation):
    """``accuracy``: the answer is the class's name, character for character, in [0, 1].

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the answers; the base model's.
        max_new_tokens: Length of an answer at most.
    """

    primary, higher_is_better = "accuracy", True

    def __init__(self, tokenizer: str, max_new_tokens: int = 8) -> None:
        super().__init__(tokenizer, max_new_tokens)

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: ExactMatch()}


class PromptedRating(PromptedClassification):
    """``spearman``: rank correlation of the numbers that answer and target spell."""

    primary, higher_is_better = "spearman", True

    def score(self) -> dict[str, Metric]:
        """Return Spearman's rho."""
        return {self.primary: TextSpearman()}
