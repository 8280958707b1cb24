"""CIDEr of captions, in the form that everybody reports (CIDEr-D)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from tasks.metrics.answers import CorpusMetric, check_pairs
from tasks.metrics.ptb import Backend, choose_ptb, ptb_tokenize

#: Longest n-gram that counts.
LONGEST = 4
#: Standard deviation of the penalty on differing lengths.
SIGMA = 6.0

Ngram = tuple[str, ...]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D of a corpus, the mean over images of :func:`cider_scores`; papers print it times 100.

    NaN without images. Args and errors as there.
    """
    scores = cider_scores(candidates, references)
    return fmean(scores) if scores else math.nan


def cider_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of every image, in [0, 10], fp64 (Vedantam et al., arXiv:1411.5726, as pycocoevalcap has it).

    Weights of n-grams come from the images given, so a subset has other scores; a single image scores 0. The penalty
    on differing lengths counts bigrams, as the reference code does.

    Args:
        candidates: One caption per image, tokenised: tokens between blanks.
        references: One or more captions per image, tokenised.

    Raises:
        ShapeError: Not as many candidates as images.
        DataError: An image without references.
    """
    check_pairs(candidates, references)
    counted = [[_ngrams(caption) for caption in captions] for captions in references]
    images = Counter(ngram for captions in counted for ngram in set().union(*captions))
    largest = math.log(len(counted)) if counted else 0.0
    scores = []
    for candidate, captions in zip(candidates, counted, strict=True):
        found = _weigh(_ngrams(candidate), images, largest)
        scores.append(10 * fmean(_similarity(found, _weigh(caption, images, largest)) for caption in captions))
    return scores


class CIDEr(CorpusMetric):
    """:func:`cider` of captions as they were generated, over many batches and processes.

    Args:
        ptb: Which tokenizer splits captions and references, see :func:`tasks.metrics.ptb.choose_ptb`.
    """

    def __init__(self, ptb: Backend = "auto") -> None:
        super().__init__()
        self.ptb = ptb

    def compute(self) -> Tensor:
        """Return CIDEr-D, fp64 scalar; papers print it times 100."""
        candidates, references = tokenised(*self.gathered(), self.ptb)
        return torch.tensor(cider(candidates, references), dtype=torch.float64)


def tokenised(
    candidates: Sequence[str], references: Sequence[Sequence[str]], ptb: Backend
) -> tuple[list[str], list[list[str]]]:
    """Return captions and references in PTB tokens, by one call of the tokenizer."""
    texts = [*candidates, *(caption for captions in references for caption in captions)]
    tokens = iter(ptb_tokenize(texts, choose_ptb(ptb)))
    return [next(tokens) for _ in candidates], [[next(tokens) for _ in captions] for captions in references]


@dataclass(frozen=True)
class _Weighted:
    """A caption's weights by n-gram, a table per n; the norm of each; and the number of bigrams."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def _ngrams(caption: str) -> Counter[Ngram]:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _weigh(counts: Counter[Ngram], images: Counter[Ngram], largest: float) -> _Weighted:
    weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * (largest - math.log(max(1, images[ngram])))
    norms = [math.sqrt(sum(weight**2 for weight in table.values())) for table in weights]
    return _Weighted(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _Weighted, reference: _Weighted) -> float:
    total = 0.0
    for n in range(LONGEST):
        other = reference.weights[n]
        common = sum(min(w, other[g]) * other[g] for g, w in candidate.weights[n].items() if g in other)
        norms = candidate.norms[n] * reference.norms[n]
        total += common / norms if norms else 0.0
    return total / LONGEST * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
