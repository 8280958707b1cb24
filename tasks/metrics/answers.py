"""What metrics over generated answers share: scores per answer, summed; or every answer kept until all are there."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import DataError, ShapeError


def check_pairs(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
    """Raise ShapeError unless there are as many predictions as targets, DataError where a target has no text.

    Args:
        predictions: N generated texts; each may be empty.
        targets: N times the accepted answers or references, at least one each.
    """
    if isinstance(predictions, str) or len(predictions) != len(targets):
        raise ShapeError(
            f"{len(predictions)} predictions of type {type(predictions).__name__} for {len(targets)} targets; "
            "expected a list of texts and as many lists of accepted answers."
        )
    for index, target in enumerate(targets):
        if isinstance(target, str) or not target:
            raise DataError(
                f"sample {index} has {target!r} as target; expected a list of at least one text. "
                "A sample without an answer cannot be scored: leave it out of the split."
            )


class AnswerMetric(Metric):
    """Mean over samples of a score per answer; a subclass states the score of one.

    The two sums are named after the class: a ``MetricCollection`` takes metrics for one and the same if their states
    agree after the first batch.
    """

    full_state_update, is_differentiable, higher_is_better = False, False, True

    def __init__(self) -> None:
        super().__init__()
        self._total, self._count = (f"{type(self).__name__}_{part}" for part in ("total", "count"))
        self.add_state(self._total, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, prediction: str, target: Sequence[str]) -> float:
        """Return the score of one generated text, in [0, 1], against what is accepted."""

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add a batch: N generated texts and N lists of accepted answers.

        Raises:
            ShapeError: Not equally many.
            DataError: A sample without any accepted answer.
        """
        check_pairs(predictions, targets)
        total = sum(self.score(prediction, target) for prediction, target in zip(predictions, targets, strict=True))
        setattr(self, self._total, getattr(self, self._total) + total)
        setattr(self, self._count, getattr(self, self._count) + len(predictions))

    def compute(self) -> Tensor:
        """Return the mean score in [0, 1], fp64 scalar; NaN without samples."""
        return getattr(self, self._total) / getattr(self, self._count)


class EmptyAnswers(Metric):
    """How many generated texts are empty or blank; for the record, beside the metric that scores them."""

    full_state_update, is_differentiable, higher_is_better = False, False, False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("empty_answers", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add a batch; only the N generated texts matter."""
        self.empty_answers += sum(not prediction.strip() for prediction in predictions)

    def compute(self) -> Tensor:
        """Return the number, int64 scalar."""
        return self.empty_answers.clone()


class CorpusMetric(Metric):
    """Keeps every answer and its references, for scores that are no mean over samples; a subclass computes them.

    Samples are kept as bytes, one line of JSON each, so that processes can hand them to each other as tensors. Metrics
    of this kind in one ``MetricCollection`` share them, which is right: all keep the same.
    """

    full_state_update, is_differentiable, higher_is_better = False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add a batch: N generated texts and N lists of references.

        Raises:
            ShapeError: Not equally many.
            DataError: A sample without references.
        """
        check_pairs(predictions, targets)
        lines = [json.dumps([p, list(t)]) + "\n" for p, t in zip(predictions, targets, strict=True)]
        content = bytearray("".join(lines), "ascii")
        if content:
            self.samples.append(torch.frombuffer(content, dtype=torch.uint8).to(self.device))

    def sync(self, *args: object, **kwargs: object) -> None:
        """Gather the samples of all processes, of those too that saw none."""
        # torchmetrics would send floats where the others send bytes.
        if isinstance(self.samples, list) and not self.samples:
            self.samples.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def gathered(self) -> tuple[list[str], list[list[str]]]:
        """Return all generated texts and their references, in the order of processes."""
        parts = self.samples if isinstance(self.samples, list) else [self.samples]
        lines = b"".join(part.cpu().numpy().tobytes() for part in parts).decode("ascii").splitlines()
        pairs = [json.loads(line) for line in lines]
        return [prediction for prediction, _ in pairs], [references for _, references in pairs]
