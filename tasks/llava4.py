"""IconQA, ImageNet, ScienceQA and VizWiz-Caption as MM-MergeBench measures them on LLaVA-1.5 (NUFILT's suite)."""

from __future__ import annotations

from typing import Literal

from torchmetrics import Metric

from tasks.captioning import Captioning
from tasks.generation import Generation
from tasks.metrics import CaptionMean7, ImageNetNamingAccuracy, ScienceQAAccuracy, StrictIconQAAccuracy


class StrictIconQA(Generation):
    """``accuracy``: text and answer equal but for case, with no rule for letters, in [0, 1]."""

    primary, higher_is_better = "accuracy", True

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: StrictIconQAAccuracy()}


class ImageNetNaming(Generation):
    """``accuracy`` of naming one of 100 choices: one text contains the other but for case, in [0, 1].

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the answers; the base model's.
        max_new_tokens: Length of an answer at most.
        strict: Count an empty answer as wrong; the published rule counts it as right.
    """

    primary, higher_is_better = "accuracy", True

    def __init__(self, tokenizer: str, max_new_tokens: int = 1024, strict: bool = False) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.strict = strict

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: ImageNetNamingAccuracy(self.strict)}

    def notes(self) -> list[str]:
        """Return how answers were made, and what an empty one counts."""
        return [*super().notes(), f"ImageNet: an empty answer counts as {'wrong' if self.strict else 'right'}"]


class ScienceQA(Generation):
    """``accuracy``: the letter that the answer names by the published patterns; unreadable ones are wrong, in [0, 1].

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the answers; the base model's.
        max_new_tokens: Length of an answer at most.
    """

    primary, higher_is_better = "accuracy", True

    def __init__(self, tokenizer: str, max_new_tokens: int = 1024) -> None:
        super().__init__(tokenizer, max_new_tokens)

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: ScienceQAAccuracy()}


class VizWizCaption(Captioning):
    """``caption_mean7``, the mean of Bleu-1 to 4, METEOR, ROUGE-L and CIDEr, and ``cider`` beside it.

    Which of the two the paper prints is not stated; the mean fits its numbers better and is the primary score.

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the captions; the base model's.
        max_new_tokens: Length of a caption at most.
        ptb: Tokenizer of both metrics, as for :class:`tasks.captioning.Captioning`.
        mean7: Compute the mean, which needs pycocoevalcap and Java; if not, ``cider`` is the primary score.
    """

    def __init__(
        self,
        tokenizer: str,
        max_new_tokens: int = 128,
        ptb: Literal["auto", "java", "simple"] = "auto",
        mean7: bool = True,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens, ptb)
        self.mean7 = mean7
        self.primary = "caption_mean7" if mean7 else "cider"

    def score(self) -> dict[str, Metric]:
        """Return CIDEr, and the mean if it is wanted."""
        return {**super().score(), **({"caption_mean7": CaptionMean7(self.ptb)} if self.mean7 else {})}
