"""ods-F of edge maps: one-to-one boundary matching, best F over one threshold for the whole set.

The work is done by ``tasks.edge_matching``, which needs SciPy (the extra ``dense``) and is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from nscmerge.errors import ConfigError, ShapeError
from tasks.edge_matching.protocol import Protocol

if TYPE_CHECKING:
    from tasks.edge_matching.curve import EdgeScores
    from tasks.edge_matching.workers import EdgeCounter

#: Marks what lies outside the image in both channels of an edge target.
_PADDING = 255


def edge_scores(
    probabilities: Iterable[Tensor | NDArray[Any]],
    edges: Iterable[Tensor | NDArray[Any]],
    max_dist: float,
    thresholds: int | Sequence[float] = 101,
    nms: bool = True,
    workers: int = 0,
    cache: str | Path | None = None,
) -> EdgeScores:
    """Return ods-F, ois-F, average precision, the best threshold, and recall, precision, F at every threshold.

    Args:
        probabilities: Of being an edge, one (H, W) per image at its own size, in [0, 1]; they are cut to 8 bit, as
            stored maps are. Maps of dtype uint8 are taken as 8 bit already.
        edges: As many boundary maps (H, W), not 0 on the boundary: lines of one pixel, taken as they are.
        max_dist: Largest distance of a matched pair as a share of the image's diagonal: 0.0075 for PASCAL-Context,
            0.011 for NYUD-v2.
        thresholds: 101 (0.001, 0.01 to 0.99, 0.999), 99 (0.01 to 0.99), 19 (0.05 to 0.95), or a list of them.
        nms: Whether strengths are thinned by non-maximum suppression first, as the protocol has it.
        workers: Processes that count; 0 counts in this one.
        cache: Folder that keeps the counts of finished images, so that a run that was cut off goes on.

    Raises:
        ShapeError: A map and its boundary differ in size.
        ConfigError: An option is out of range, or SciPy is missing.
    """
    counter = edge_counter(Protocol.of(max_dist, thresholds, nms), workers, cache)
    images = [(quantise(p), _array(e) != 0) for p, e in zip(probabilities, edges, strict=True)]
    try:
        total, best = _sums(counter, images)
    finally:
        counter.close()
    return _scores(total, best, counter.protocol)


def ods_f(
    probabilities: Iterable[Tensor | NDArray[Any]],
    edges: Iterable[Tensor | NDArray[Any]],
    max_dist: float,
    thresholds: int | Sequence[float] = 101,
    nms: bool = True,
    workers: int = 0,
    cache: str | Path | None = None,
) -> float:
    """Return the largest F over one threshold for all images, in [0, 1]; 0 if nothing matches.

    Per threshold: pixels above it, thinned, are matched with the boundary one to one within ``max_dist``; counts are
    pooled over the images. Args and errors as :func:`edge_scores`, which returns more.

    Source: Martin, Fowlkes and Malik 2004, in the protocol of SEISM ``fb`` that multi-task papers use.
    """
    return edge_scores(probabilities, edges, max_dist, thresholds, nms, workers, cache).ods_f


def quantise(probability: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """Return floor(255 p), uint8, of the same shape; uint8 stays. A NaN becomes 0, no edge.

    Computed in the map's own precision (at least float32), in which k / 255 gives back k.
    """
    if isinstance(probability, Tensor) and probability.is_floating_point():  # NumPy has no bfloat16
        probability = probability.to(torch.promote_types(probability.dtype, torch.float32))
    values = _array(probability)
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating) or values.dtype == np.float16:
        values = values.astype(np.float32)
    levels = np.floor(np.nan_to_num(values) * values.dtype.type(255))
    return np.clip(levels, 0, 255).astype(np.uint8)


class OdsF(Metric):
    """:func:`ods_f` over many batches and processes; :meth:`scores` has the whole table.

    Args:
        max_dist: Largest distance of a matched pair as a share of the image's diagonal: 0.0075 for PASCAL-Context,
            0.011 for NYUD-v2.
        thresholds: 101, 99, 19, or a list of them.
        nms: Whether strengths are thinned by non-maximum suppression first.
        workers: Processes that count, for each process that evaluates; 0 counts in this one.
        cache: Folder that keeps the counts of finished images.
        counter: Counts instead of one of the metric's own; metrics of many models share its workers. Made with the same
            options, see :func:`edge_counter`.

    Raises:
        ConfigError: An option is out of range.
    """

    full_state_update, is_differentiable, higher_is_better = False, False, True

    def __init__(
        self,
        max_dist: float,
        thresholds: int | Sequence[float] = 101,
        nms: bool = True,
        workers: int = 0,
        cache: str | Path | None = None,
        counter: EdgeCounter | None = None,
    ) -> None:
        super().__init__()
        self.protocol, self.workers, self.cache = Protocol.of(max_dist, thresholds, nms), workers, cache
        self._counting = counter
        # Sums alone, not one entry per image: the best threshold of an image is its own affair.
        size = len(self.protocol.thresholds)
        self.add_state("counts", torch.zeros(size, 3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("best", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (N, H, W), and labels (N, 2, H, W).

        Channel 1 of the labels is read: the boundary, 1 or 0, and 255 around the image, by which both are cut to its
        own size.

        Raises:
            ShapeError: Other shapes.
            ConfigError: An image whose channel 1 is 255 throughout (train splits hold no boundary), or not a rectangle;
                or SciPy is missing.
        """
        if prediction.ndim != 3 or target.shape != (len(prediction), 2, *prediction.shape[1:]):
            raise ShapeError(
                f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}; "
                "expected (N, H, W) and (N, 2, H, W)."
            )
        if self._counting is None:
            self._counting = edge_counter(self.protocol, self.workers, self.cache)
        wide = torch.promote_types(prediction.dtype, torch.float32)
        levels = quantise(prediction.to(wide).sigmoid())
        boundaries = _array(target[:, 1])
        images = [crop(*image) for image in zip(levels, boundaries, strict=True)]
        total, best = _sums(self._counting, images)
        self.counts += torch.from_numpy(total).to(self.counts.device)
        self.best += torch.from_numpy(best).to(self.best.device)

    def compute(self) -> Tensor:
        """Return ods-F, fp64 scalar, and end the workers."""
        if self._counting is not None:
            self._counting.close()
        return torch.tensor(self.scores().ods_f, dtype=torch.float64, device=self.counts.device)

    def scores(self) -> EdgeScores:
        """Return all scores of what this process has counted (of all, within ``sync_context()``)."""
        return _scores(self.counts.cpu().numpy(), self.best.cpu().numpy(), self.protocol)


class OisF(OdsF):
    """F where every image has its own best threshold; counts as :class:`OdsF`, with which it can share its states."""

    def compute(self) -> Tensor:
        """Return ois-F, fp64 scalar in [0, 1]."""
        super().compute()
        return torch.tensor(self.scores().ois_f, dtype=torch.float64, device=self.counts.device)


class EdgeAveragePrecision(OdsF):
    """Average precision over recalls 0, 0.01 ... 1; counts as :class:`OdsF`, with which it can share its states."""

    def compute(self) -> Tensor:
        """Return the average precision, fp64 scalar in [0, 1]."""
        super().compute()
        return torch.tensor(self.scores().average_precision, dtype=torch.float64, device=self.counts.device)


def crop(levels: NDArray[np.uint8], boundary: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return map and boundary without the padding, which the boundary marks by 255.

    Raises:
        ConfigError: Nothing is left, or what is left is no rectangle.
    """
    inside = boundary != _PADDING
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        raise ConfigError(
            "an edge target has 255 everywhere in channel 1, so there is no boundary to compare with. Train splits "
            "hold none: evaluate on val or test."
        )
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    if not inside[window].all():
        raise ConfigError("channel 1 of an edge target has 255 inside the image; only the padding around it may.")
    return levels[window], boundary[window] != 0


def _array(x: Tensor | NDArray[Any]) -> NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def edge_counter(protocol: Protocol, workers: int = 0, cache: str | Path | None = None) -> EdgeCounter:
    """Return what counts edges.

    Args:
        protocol: Distance, thresholds, suppression.
        workers: Processes that count; 0 counts in this one.
        cache: Folder that keeps the counts of finished images.

    Raises:
        ConfigError: SciPy is missing, or ``workers`` is negative.
    """
    try:
        from tasks.edge_matching.workers import EdgeCounter
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f"ods-F needs the package {package}, which is missing. Install the extra: pip install 'nscmerge[dense]'."
        ) from error
    return EdgeCounter(protocol, workers, cache)


def _sums(counter: EdgeCounter, images: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the counts of all images, summed, and those at every image's best threshold, summed."""
    from tasks.edge_matching.curve import best_row

    total, best = np.zeros((len(counter.protocol.thresholds), 3), np.int64), np.zeros(3, np.int64)
    for counts in counter.count(images):
        total += counts
        best += best_row(counts)
    return total, best


def _scores(total: NDArray[np.int64], best: NDArray[np.int64], protocol: Protocol) -> EdgeScores:
    from tasks.edge_matching.curve import scores

    return scores(total, best, protocol.thresholds)
