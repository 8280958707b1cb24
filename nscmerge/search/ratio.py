"""The label-free criterion: the mean null-space ratio of the merged model on a few unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nscmerge.adapters import Adapter
from nscmerge.batching import TaskKey, fuse, tasks_of
from nscmerge.errors import ConfigError, TargetError
from nscmerge.geometry import residual_ratio, row_space
from nscmerge.objectives.greedy import start_decoder
from nscmerge.objectives.ratios import Basis, sample_ratios
from nscmerge.search.criterion import Criterion, TaskValues
from nscmerge.surgery import resolve_layer
from nscmerge.targets import Blocks, select_targets


@dataclass(frozen=True)
class Reading:
    """Which layers are read, as the NSC objective names its targets.

    Args:
        blocks: ``last_quarter``, a number of last blocks, or a list of indices.
        projections: Exact projection names; None takes the attention's output projection, else the value projection.
        match: Compare scales by |ratio - that of the task's own expert| instead of the ratio: neither more nor less
            compressed than where the adapter was trained.
    """

    blocks: Blocks = "last_quarter"
    projections: list[str] | None = None
    match: bool = False


class NullSpaceRatio(Criterion):
    """Mean over tasks of the ratio of each task's own adapter on its own inputs (spec of the NSC objective, residual).

    Args:
        blocks: As in :class:`Reading`.
        projections: As in :class:`Reading`.
        match: As in :class:`Reading`.
        also: Further choices of layers by curve name, read from the same forward passes.
        batches: Read so many of the data module's label-free validation batches; None reads all.

    Raises:
        ConfigError: ``batches`` is below 1.
    """

    label_free = True

    def __init__(
        self,
        blocks: Blocks = "last_quarter",
        projections: list[str] | None = None,
        match: bool = False,
        also: dict[str, Reading] | None = None,
        batches: int | None = None,
    ) -> None:
        super().__init__()
        if batches is not None and batches < 1:
            raise ConfigError(f"batches is {batches}; expected at least 1, or null for all.")
        self.most = batches
        self.readings = {"": Reading(blocks, projections, match), **(also or {})}
        self.targets: dict[str, list[str]] = {}

    @property
    def suffixes(self) -> list[str]:
        """The names of the readings."""
        return list(self.readings)

    def prepare(self, model: nn.Module, experts: Mapping[str, Adapter]) -> None:
        """Select the layers of every reading, and compute every task's row space there.

        Raises:
            TargetError: No layer is selected, or a task's adapter has none of the selected ones.
        """
        layers = {layer for expert in experts.values() for layer in expert.layers}
        for curve, reading in self.readings.items():
            self.targets[curve] = chosen = select_targets(model, layers, reading.blocks, reading.projections)
            for task, expert in experts.items():
                if not any(target in expert.layers for target in chosen):
                    raise TargetError(
                        f"the adapter of '{task}' has none of the layers {', '.join(chosen[:4])}, ..., so its ratio "
                        "is undefined there. Choose blocks and projections that every adapter has."
                    )
        every = sorted({target for chosen in self.targets.values() for target in chosen})
        self._paths = {target: resolve_layer(model, target) for target in every}
        self._spaces = {
            task: {t: row_space(expert.layers[t].A).float() for t in every if t in expert.layers}
            for task, expert in experts.items()
        }
        self._tasks = list(experts)
        # A NaN must show, hence "disable". A plain list to index by number; the module list moves them to the device.
        self._means = [[MeanMetric(nan_strategy="disable") for _ in experts] for _ in self.readings]
        self.metrics = nn.ModuleList(nn.ModuleList(means) for means in self._means)

    def batches(self, data: LightningDataModule) -> Iterator[tuple[TaskKey, dict[str, Tensor]]]:
        """Yield the label-free validation batches task by task: a merge may keep weights per task."""
        for batch in islice(data.val_dataloader(), self.most):
            yield from batch.items()

    def update(self, model: nn.Module, tasks: TaskKey, batch: Mapping[str, Tensor]) -> None:
        """Add the ratios of a batch, from one forward pass that stops at the last layer that is read."""
        names = tasks_of(tasks)
        (group,) = fuse({names: batch})
        read = sorted({target for task in names for target in self._spaces[task]})
        captured = capture(model, start_decoder(model, group.inputs), {target: self._paths[target] for target in read})
        for task in names:
            self._add(task, captured, group.mask)

    def _add(self, task: str, captured: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Add the ratios of one task's own adapter to its means, one for each reading."""
        for targets, means in zip(self.targets.values(), self._means, strict=True):
            bases = {}
            for target in targets:
                if target in self._spaces[task]:
                    rows = self._spaces[task][target].to(captured[target].device)
                    bases[target] = Basis(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
            z = captured[next(iter(bases))]
            owner = torch.zeros(len(z), dtype=torch.long, device=z.device)
            omega = sample_ratios(captured, owner, bases, mask, ratio=residual_ratio)
            means[self._tasks.index(task)].update(omega)

    def compute(self) -> dict[str, TaskValues]:
        """Return the mean ratio over samples, in [0, 1], per reading and task."""
        return {
            curve: {task: float(mean.compute()) for task, mean in zip(self._tasks, means, strict=True)}
            for curve, means in zip(self.readings, self._means, strict=True)
        }

    def relative(self, values: TaskValues, experts: TaskValues, suffix: str = "") -> TaskValues:
        """Return the ratios, or how far they are from the experts' where the reading says so."""
        if not self.readings[suffix].match:
            return values
        return {task: abs(ratio - experts[task]) for task, ratio in values.items()}

    def options(self) -> dict[str, Any]:
        """Return the readings and the layers that came of them."""
        return {
            "readings": {curve: asdict(reading) for curve, reading in self.readings.items()},
            "batches": self.most,
            "targets": self.targets,
        }


class _AllCaptured(Exception):
    """Ends a forward pass: the last layer has its input."""


def capture(model: nn.Module, inputs: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Return ``{name: input of the module at its path}`` of one forward pass, which ends once all are there.

    Raises:
        TargetError: A module runs twice or never.
    """
    captured: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name in captured:
            raise TargetError(f"layer '{name}' runs more than once per forward pass; leave it out.")
        captured[name] = args[0]
        if len(captured) == len(paths):
            raise _AllCaptured

    hooks = [model.get_submodule(path).register_forward_pre_hook(partial(record, name)) for name, path in paths.items()]
    try:
        model(**inputs)
    except _AllCaptured:
        return captured
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(set(paths) - captured.keys())
    raise TargetError(f"the model's forward pass never ran the layers {missing}; read layers that it uses.")
