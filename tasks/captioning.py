"""Captions of images, scored by CIDEr: COCO and Flickr30k."""

from __future__ import annotations

from typing import Literal

from torchmetrics import Metric

from tasks.generation import Generation
from tasks.metrics import CIDEr
from tasks.metrics.ptb import ptb_note


class Captioning(Generation):
    """``cider`` over the whole split, raw: papers print it times 100.

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the captions; the base model's.
        max_new_tokens: Length of a caption at most.
        ptb: Tokenizer of the metric: ``java``, Stanford's as published; ``simple``, an approximation in Python; or
            ``auto``, Java where it is installed. Which one it was is noted with the scores.
    """

    primary, higher_is_better = "cider", True

    def __init__(
        self, tokenizer: str, max_new_tokens: int = 128, ptb: Literal["auto", "java", "simple"] = "auto"
    ) -> None:
        super().__init__(tokenizer, max_new_tokens)
        self.ptb = ptb

    def score(self) -> dict[str, Metric]:
        """Return CIDEr."""
        return {"cider": CIDEr(self.ptb)}

    def notes(self) -> list[str]:
        """Return how captions were made, and the metric's tokenizer where it is not the published one."""
        return [*super().notes(), *ptb_note(self.ptb)]
