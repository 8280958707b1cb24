"""Second moments of the inputs of layers, in each task's own expert; no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from nscmerge.batching import MASK
from nscmerge.candidates import expert_layers
from nscmerge.layer_names import ModelNames
from nscmerge.switch import attach_switch
from tasks.continual.module import ContinualBenchmark
from tasks.continual.seen import unlabelled


class _Collector:
    """Adds up x x^T of one layer's inputs over valid tokens."""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        valid = self.mask
        rows = x[valid.bool()] if valid is not None and valid.shape == x.shape[:-1] else x.flatten(0, -2)
        # Within a batch in fp32 at least, over batches in fp64.
        rows = rows.float()
        self.sum += (rows.T @ rows).double().cpu()
        self.count += len(rows)

    @property
    def moment(self) -> Tensor:
        """E[x x^T], fp32."""
        return (self.sum / max(self.count, 1)).float()


@torch.no_grad()
def input_moments(module: ContinualBenchmark, data: LightningDataModule, samples: int) -> dict[str, dict[str, Tensor]]:
    """Return E[x x^T] of every layer that an expert changes, by task, then by layer name as the expert spells it.

    x are the inputs of the layer in the task's own expert, mean over valid tokens and samples.

    Args:
        module: Model and experts.
        data: Their inputs: of the validation split, without labels.
        samples: At most so many per task.

    Raises:
        ConfigError: The data module gives no batches of a chosen split.
    """
    module.configure_model()
    return {task: _of_task(module, task, batches) for task, batches in unlabelled(data, samples).items()}


def _of_task(module: ContinualBenchmark, task: str, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    expert = module.expert(task)
    names = [*expert.layers, *(t.removesuffix(".weight") for t in expert.dense)]
    switch = attach_switch(module.model, {"expert": expert_layers(module.model, expert, task)})
    switch.activate("expert")
    model = ModelNames(module.model)
    device = next(module.model.parameters()).device
    evaluator = module.task_of(task)
    collectors, handles = {}, []
    for name in dict.fromkeys(names):
        path = model.find(name)
        linear = model.modules[path] if path is not None else None
        width = getattr(getattr(linear, "base", linear), "in_features", None)
        if linear is None or width is None:
            continue  # not a linear layer: norms, biases, embeddings
        collectors[name] = _Collector(width)
        handles.append(linear.register_forward_pre_hook(collectors[name]))
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            for collector in collectors.values():
                collector.mask = inputs.get(MASK)
            evaluator(module.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        switch.detach()
    return {name: collector.moment for name, collector in collectors.items()}
