"""Every metric of generated text with a few answers; run as a program, one share of them.

python -m tests.fakes.text_metric_cases RANK WORLD STORE OUT.json

joins a gloo group of WORLD processes, scores this process's answers and writes what it computes.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torchmetrics import Metric

from tasks.metrics import (
    ANLS,
    CIDEr,
    EmptyAnswers,
    ExactMatch,
    IconQAAccuracy,
    ImageNetNamingAccuracy,
    RelaxedAccuracy,
    ScienceQAAccuracy,
    StrictIconQAAccuracy,
    TextSpearman,
    VQAAccuracy,
)

ANSWERS = ["a cat on a mat", "a dog", "", "3.1", "A. naïve café", "B", "7", " "]
TARGETS = [
    ["a cat on the mat", "one cat"],
    ["a dog runs"],
    ["a"],
    ["3", "4"],
    ["a", "A. naïve cafe"],
    ["B"],
    ["6.9"],
    ["8"],
]
#: Rows of each process: uneven shares, and one process without any.
SHARES = {1: {"shared": [range(8)]}, 2: {"shared": [range(4), range(4, 8)], "idle": [range(8), range(0)]}}


def metrics() -> dict[str, Metric]:
    """Return new metrics, by name."""
    classes = [ANLS, EmptyAnswers, ExactMatch, IconQAAccuracy, ImageNetNamingAccuracy]
    classes += [RelaxedAccuracy, ScienceQAAccuracy, StrictIconQAAccuracy, TextSpearman, VQAAccuracy]
    return {"CIDEr": CIDEr("simple"), **{metric.__name__: metric() for metric in classes}}


def share(rank: int, world: int) -> dict[str, dict[str, float]]:
    """Return all metrics over this process's answers and, in a group, those of the others, per way to share them."""
    return {way: _score(rows[rank]) for way, rows in SHARES[world].items()}


def _score(rows: range) -> dict[str, float]:
    values = {}
    for name, metric in metrics().items():
        for row in rows:
            target = ["B"] if name == "ScienceQAAccuracy" else TARGETS[row]
            metric.update(ANSWERS[row : row + 1], [target])
        values[name] = float(metric.compute())
    return values


def in_group(rank: int, world: int, store: Path) -> dict[str, dict[str, float]]:
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
