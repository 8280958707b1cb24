"""Passes over data outside Lightning's own loops: for what is measured once, before or after a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from tasks.base import Task

Batch = dict[str, Any]
#: Class indices, maps or token labels; a list where answers are texts.
Target = Any


def split_target(batch: Batch) -> tuple[dict[str, Tensor], Target]:
    """Return the inputs of a batch, and its target."""
    return {key: value for key, value in batch.items() if key != "target"}, batch["target"]


def batches(
    module: LightningModule, loader: Iterable[Batch], limit: float = math.inf
) -> Iterator[tuple[dict[str, Tensor], Target]]:
    """Yield inputs and target on the module's device, in eval mode, without gradients, in the trainer's precision.

    Args:
        module: Whose device, hooks and trainer.
        loader: Of labelled batches.
        limit: Batches at most.
    """
    was_training = {name: part.training for name, part in module.named_modules()}
    module.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        for number, batch in enumerate(loader):
            if number >= limit:
                break
            yield split_target(module.transfer_batch_to_device(batch, module.device, 0))
    for name, part in module.named_modules():
        part.training = was_training[name]


def final_scores(module: LightningModule, model: nn.Module, task: Task) -> dict[str, dict[str, float]]:
    """Return the task's metrics on the validation and the test split of the module's data; nothing without any."""
    data = module.trainer.datamodule
    if data is None:
        return {}
    data.setup("test")
    scores = {}
    for split, loader in {"val": data.scored_dataloader("val"), "test": data.test_dataloader()}.items():
        metrics, predict = task.metrics().to(module.device), task.evaluator()
        for inputs, target in batches(module, loader):
            metrics.update(predict(model, inputs), target)
        scores[split] = {metric: float(value) for metric, value in metrics.compute().items()}
    return scores
