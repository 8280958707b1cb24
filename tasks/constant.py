"""The best prediction that looks at no image, per dense task: what every expert has to beat.

``python -m tasks.constant --data configs/data/synth20.yaml --experts tasks/experts/synth20`` prints the table and ends
with exit status 1 if an expert does not beat it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import singledispatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import LightningDataModule
from torch import Tensor

from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError
from tasks.dense import IGNORE, DenseTask
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges
from tasks.expert import CARD
from tasks.normals import SurfaceNormals
from tasks.saliency import Saliency
from tasks.segmentation import Segmentation

#: Logit that is as good as certain.
_CERTAIN = 20.0


@singledispatch
def constants(task: DenseTask, targets: Tensor) -> Tensor:
    """Return candidates for the best constant, (K, channels), as outputs of the task's decoder.

    Args:
        task: Which metric has to be served.
        targets: Of training samples, as the task's data module gives them, (M, ...).

    Raises:
        ConfigError: The task is of no kind that has one.
    """
    raise ConfigError(f"no constant predictor is known for {type(task).__name__}.")


@constants.register
def _(task: Segmentation, targets: Tensor) -> Tensor:
    """The most frequent class."""
    counts = torch.bincount(targets[targets != IGNORE], minlength=task.num_classes)
    return _CERTAIN * torch.eye(task.num_classes)[counts.argmax()][None]


@constants.register
def _(task: Saliency, targets: Tensor) -> Tensor:
    """All foreground, or all background."""
    return _CERTAIN * torch.eye(2)


@constants.register
def _(task: Edges, targets: Tensor) -> Tensor:
    """All edge, or no edge: for ods-F, which thresholds, anything between is one of the two."""
    return torch.tensor([[_CERTAIN], [-_CERTAIN]])


@constants.register
def _(task: Depth, targets: Tensor) -> Tensor:
    """The mean, which is best for the RMSE, and the median."""
    valid = targets[targets != IGNORE]
    return torch.stack([valid.mean(), valid.median()])[:, None]


@constants.register
def _(task: SurfaceNormals, targets: Tensor) -> Tensor:
    """The mean direction, the medians, and the most frequent axis."""
    valid = targets.movedim(1, -1)[(targets != IGNORE).all(1)]
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    axis = axes[torch.bincount((valid @ axes.T).argmax(-1), minlength=6).argmax()]
    return torch.stack([valid.mean(0), valid.median(0).values, axis])


@constants.register
def _(task: DenseRegression, targets: Tensor) -> Tensor:
    """The median per channel for the L1, the mean for the RMSE."""
    return task.constant(targets)[None]


def constant_scores(task: DenseTask, data: Any, samples: int = 512) -> dict[str, float]:
    """Return the test metrics of the constant that is best on the training split by the primary metric.

    Args:
        task: The task; its decoder is set to the constant.
        data: Its data module, set up for fit and test.
        samples: Training samples to read, evenly spaced.
    """
    train = data.dataset("train")
    chosen = [i * len(train) // min(samples, len(train)) for i in range(min(samples, len(train)))]
    read: Callable[[int], Tensor] = train.target if hasattr(train, "target") else lambda i: train[i]["target"]
    candidates = constants(task, torch.stack([read(i) for i in chosen]))
    if len(candidates) > 1:
        # Edges carry what ods-F needs in evaluation splits only, hence the validation split to choose by.
        scores = [_scores(task, candidate, data.val_dataloader())[task.primary] for candidate in candidates]
        best = max(scores) if task.higher_is_better else min(scores)
        candidates = candidates[scores.index(best)][None]
    return _scores(task, candidates[0], data.test_dataloader())


@torch.no_grad()
def _scores(task: DenseTask, constant: Tensor, loader: Any) -> dict[str, float]:
    task.decoder.weight.zero_()
    assert task.decoder.bias is not None  # for the type checker
    task.decoder.bias.copy_(constant)
    metrics = task.metrics()
    for batch in loader:
        inputs = {key: value for key, value in batch.items() if key != "target"}
        empty = torch.zeros(len(batch["target"]), task.decoder.in_channels, 1, 1)
        metrics.update(task.predict(empty, inputs), batch["target"])
    return {name: float(value) for name, value in metrics.compute().items()}


def compare(data: LightningDataModule, experts: str, samples: int = 512) -> bool:
    """Print the test score of every task's expert beside the constant's; return whether all experts are better.

    Args:
        data: A :class:`datamodules.joint.JointDataModule` over dense tasks.
        experts: Folder that holds an expert per task name, or ``package:NAME/FOLDER``.
        samples: Training samples to choose a constant by.
    """
    data.prepare_data()
    print(f"{'task':<16} {'metric':<9} {'':<6} {'constant':>9} {'expert':>9}")
    beaten = True
    for name, module in data.tasks.items():
        card = json.loads((Path(resolve_source(experts)) / name / CARD).read_text(encoding="utf-8"))
        home, _, kind = card["task"]["class_path"].rpartition(".")
        task = getattr(import_module(home), kind)(**card["task"]["init_args"])
        module.setup("fit")
        module.setup("test")
        constant, expert = constant_scores(task, module, samples)[task.primary], card["scores"]["test"][task.primary]
        better = expert > constant if task.higher_is_better else expert < constant
        beaten &= better
        direction = "higher" if task.higher_is_better else "lower"
        verdict = "" if better else "  NOT BETTER"
        print(f"{name:<16} {task.primary:<9} {direction:<6} {constant:>9.4f} {expert:>9.4f}{verdict}")
    return beaten


def main(args: Sequence[str] | None = None) -> None:
    """Run :func:`compare` from a command line."""
    raise SystemExit(0 if auto_cli(compare, as_positional=False, args=args) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
