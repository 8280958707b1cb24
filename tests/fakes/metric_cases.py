"""Every dense metric with a small batch in the form that its task predicts; run as a program, one share of it.

python -m tests.fakes.metric_cases RANK WORLD STORE OUT.json

joins a gloo group of WORLD processes, counts this process's images and writes what it computes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.metrics import (
    L1,
    MSE,
    RMSE,
    EdgeReferenceLoss,
    MeanAngularError,
    MeanIoU,
    OdsF,
    SaliencyMaxF,
    SaliencyMaxFDoubleSigmoid,
    SaliencyMIoU,
)

IMAGES, HEIGHT, WIDTH = 5, 18, 23
#: Images of each process: an uneven share.
SHARES = {1: [range(5)], 2: [range(4), range(4, 5)]}


@dataclass
class Case:
    """A metric and its data; ``ignored`` (N, H, W) marks pixels that must not count, None where all do."""

    metric: Callable[[], Metric]
    prediction: Tensor
    target: Tensor
    ignored: Tensor | None = None


def cases() -> dict[str, Case]:
    """Return all cases, the same in every process."""
    draw = torch.Generator().manual_seed(0)

    def normal(*channels: int) -> Tensor:
        return torch.randn(IMAGES, *channels, HEIGHT, WIDTH, generator=draw)

    hole = torch.rand(IMAGES, HEIGHT, WIDTH, generator=draw) < 0.2
    classes = torch.randint(0, 4, (IMAGES, HEIGHT, WIDTH), generator=draw).masked_fill(hole, 255)
    blob = normal().gt(0.3).long().masked_fill(hole, 255)
    depth = (1 + normal().abs()).masked_fill(hole, 255)
    normals = normal(3).masked_fill(hole[:, None], 255)
    padding = torch.ones(IMAGES, HEIGHT, WIDTH, dtype=torch.bool)
    for image in padding:  # images of several sizes in one batch
        top, left = torch.randint(0, 4, (2,), generator=draw).tolist()
        image[top : HEIGHT - 1, left : WIDTH - 2] = False
    lines = torch.zeros(IMAGES, HEIGHT, WIDTH)
    lines[:, 8, 3:15] = lines[:, 4:14, 9] = 1
    edges = torch.stack([lines.masked_fill(hole | padding, 255), lines.masked_fill(padding, 255)], 1)
    edge_logits = 4 * torch.roll(lines, (1, 1), (1, 2)) - 2 + 0.5 * normal()
    euclidean = torch.cat([normal(1), (~hole).float()[:, None]], 1)
    euclidean_prediction, curvature, curvature_prediction = normal(1), normal(2), normal(2)
    saliency = normal(2)

    return {
        "mIoU": Case(lambda: MeanIoU(6), normal(6), classes, hole),
        "mIoU_present": Case(lambda: MeanIoU(6, skip_absent=True), normal(6), classes, hole),
        "rmse": Case(lambda: RMSE(ignore_value=255), depth + normal(), depth, hole),
        "mErr": Case(MeanAngularError, 3 * normal(3), normals, hole),
        "l1": Case(L1, euclidean_prediction, euclidean),
        "l1_masked": Case(lambda: L1(mask_channel=True), euclidean_prediction, euclidean, hole),
        "curvature_rmse": Case(RMSE, curvature_prediction, curvature),
        "curvature_mse": Case(MSE, curvature_prediction, curvature),
        "sal_mIoU": Case(SaliencyMIoU, saliency, blob, hole),
        "sal_maxF": Case(SaliencyMaxF, saliency, blob, hole),
        "sal_maxF_double_sigmoid": Case(SaliencyMaxFDoubleSigmoid, saliency, blob, hole),
        "edge_refloss": Case(EdgeReferenceLoss, edge_logits, edges, hole | padding),
        "odsF": Case(lambda: OdsF(0.05, thresholds=19), edge_logits, edges, padding),
    }


def share(rank: int, world: int) -> dict[str, float]:
    """Return all metrics over this process's images and, in a group, those of the others."""
    values = {}
    for name, case in cases().items():
        metric = case.metric()
        for batch in torch.tensor(list(SHARES[world][rank])).split(3):
            metric.update(case.prediction[batch], case.target[batch])
        values[name] = float(metric.compute())
    return values


def in_group(rank: int, world: int, store: Path) -> dict[str, float]:
    """Return :func:`share` as a member of a group that meets at the file ``store`` and ends afterwards."""
    method, patience = f"file://{store}", timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=patience)
    try:
        return share(rank, world)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    values = in_group(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(values))
