"""The seven caption scores of MM-MergeBench's VizWiz-Caption and their mean."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from nscmerge.errors import ConfigError, DataError
from tasks.metrics.answers import CorpusMetric, check_pairs
from tasks.metrics.cider import cider, tokenised
from tasks.metrics.ptb import Backend, missing_java


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return Bleu_1 to Bleu_4, METEOR, ROUGE_L and CIDEr of a corpus; papers print each times 100.

    All but CIDEr by pycocoevalcap, METEOR through Java.

    Args:
        candidates: One caption per image, tokenised: tokens between blanks. At least one image.
        references: One or more captions per image, tokenised.

    Raises:
        ShapeError: Not as many candidates as images.
        DataError: No image, an image without references, or the METEOR program failed.
        ConfigError: The extra ``captions`` or a Java runtime is missing.
    """
    check_pairs(candidates, references)
    if not candidates:
        raise DataError("there are no captions to score; expected at least one image.")
    check_caption_mean7()
    found = {index: [_clean(caption)] for index, caption in enumerate(candidates)}
    expected = {index: [_clean(caption) for caption in captions] for index, captions in enumerate(references)}
    bleu = _scorer("bleu.bleu", "Bleu")(4)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
        values, _ = bleu.compute_score(expected, found)
    scores = {f"Bleu_{n}": float(value) for n, value in enumerate(values, 1)}
    scores["METEOR"] = _meteor(expected, found)
    scores["ROUGE_L"] = float(_scorer("rouge.rouge", "Rouge")().compute_score(expected, found)[0])
    return {**scores, "CIDEr": cider(candidates, references)}


def caption_mean7(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the plain mean of the seven :func:`caption_scores`; printed times 100. Args and errors as there."""
    return fmean(caption_scores(candidates, references).values())


def check_caption_mean7() -> None:
    """Raise ConfigError if the seven scores cannot be computed here; ask before hours of generation, not after."""
    if missing := missing_java():
        raise ConfigError(f"Bleu, METEOR and ROUGE-L of captions cannot run: {missing}. Or report CIDEr alone.")


class CaptionMean7(CorpusMetric):
    """:func:`caption_mean7` of captions as they were generated, over many batches and processes.

    Args:
        ptb: Which tokenizer splits captions and references, see :func:`tasks.metrics.ptb.choose_ptb`.

    Raises:
        ConfigError: The extra ``captions`` or a Java runtime is missing.
    """

    def __init__(self, ptb: Backend = "auto") -> None:
        check_caption_mean7()
        super().__init__()
        self.ptb = ptb

    def compute(self) -> Tensor:
        """Return the mean of the seven scores, fp64 scalar; NaN without samples."""
        candidates, references = self.gathered()
        mean = caption_mean7(*tokenised(candidates, references, self.ptb)) if candidates else torch.nan
        return torch.tensor(mean, dtype=torch.float64)


def _scorer(module: str, name: str) -> type:
    found: type = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    return found


def _meteor(expected: dict[int, list[str]], found: dict[int, list[str]]) -> float:
    meteor = _scorer("meteor.meteor", "Meteor")()
    try:
        return float(meteor.compute_score(expected, found)[0])
    except (OSError, ValueError) as error:
        raise DataError(
            f"the METEOR program of pycocoevalcap failed ({error}); it needs a Java runtime and 2 GB of memory."
        ) from error


def _clean(caption: str) -> str:
    # METEOR's protocol is one line per image with ||| between fields.
    return " ".join(caption.replace("|||", " ").split())
