"""Tasks that an encoder-decoder answers in words: GLUE on Flan-T5 (fusion-bench)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torchmetrics import Metric

from nscmerge.objectives.greedy import start_decoder
from tasks.generation import Generation
from tasks.metrics import ExactMatch, TextSpearman


class TextToText(Generation):
    """``accuracy``: the answer is the target, character for character, in [0, 1]; for CoLA, MRPC and QQP, too.

    Args:
        tokenizer: Folder or hub id of the tokenizer that decodes the answers; the base model's.
        max_new_tokens: Length of an answer at most; the published 10 count the decoder's start token.
    """

    primary, higher_is_better = "accuracy", True
    shift = False

    def __init__(self, tokenizer: str, max_new_tokens: int = 9) -> None:
        super().__init__(tokenizer, max_new_tokens)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits at every position of the decoder, (N, T, V); of its start where no answer is given."""
        return super().features(model, start_decoder(model, inputs))

    def score(self) -> dict[str, Metric]:
        """Return the accuracy."""
        return {self.primary: ExactMatch()}


class TextSimilarity(TextToText):
    """``spearman``: rank correlation of the numbers that answer and target spell; for STS-B."""

    primary, higher_is_better = "spearman", True

    def score(self) -> dict[str, Metric]:
        """Return Spearman's rho."""
        return {self.primary: TextSpearman()}
