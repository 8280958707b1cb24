"""One base model, one update at a time, the tasks seen so far: what a continual protocol tests again and again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from torch import nn

from nscmerge.adapters import Adapter
from nscmerge.base_model import BaseModel, load_base_model
from nscmerge.batching import tasks_of
from nscmerge.candidates import expert_layers, merge_layers
from nscmerge.continual import METHODS, ContinualMethod, make
from nscmerge.errors import ConfigError
from nscmerge.switch import Layers, attach_switch
from nscmerge.update import Update
from nscmerge.whole import on_model
from tasks.base import Task
from tasks.benchmark import Benchmark
from tasks.continual.checkpoints import read_checkpoint
from tasks.continual.orders import Orders, task_orders
from tasks.continual.seen import SeenData, unlabelled
from tasks.expert import read_expert

#: Name of the one update that is attached.
_STEP = "step"
#: What stands for a task's name in a pattern of experts.
_PLACE = "{task}"


@dataclass(frozen=True)
class ContinualForm:
    """A continual method as a configuration names it.

    Args:
        method: A name in :data:`nscmerge.continual.METHODS`.
        variant: ``default``, ``papercode``, or a method's own.
        options: The method's options; those left out have their defaults.
        samples: For methods that learn from unlabelled inputs: how many of each task.
        batch_size: For those: inputs per step.
    """

    method: str
    variant: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 100
    batch_size: int = 8

    @property
    def learns(self) -> bool:
        """Whether the method needs a model and unlabelled inputs."""
        return {"model", "batches", "tasks"} <= set(METHODS[self.method].OBJECTS)

    def make(self, **objects: Any) -> ContinualMethod:
        """Return the method.

        Args:
            **objects: Model, batches and tasks, for one that learns.

        Raises:
            MethodError: An unknown name or an option out of range.
        """
        return make(self.method, self.variant, **self.options, **objects)

    def settings(self) -> dict[str, Any]:
        """Return all options for the record, JSON-able."""
        found = json.loads(json.dumps(self.make().options, default=str))
        return {**found, "samples": self.samples, "batch_size": self.batch_size} if self.learns else found


class ContinualBenchmark(Benchmark):
    """Tests continual methods over several task orders; :func:`tasks.continual.protocol.run` drives it.

    Args:
        base_model: Frozen base, as :func:`nscmerge.base_model.load_base_model` reads it.
        tasks: Head, prediction and metrics by task name; a seeded order shuffles them as they stand here.
        experts: Adapter by task name, or a pattern with ``{task}`` in the place of the name.
        methods: By the name that the tables show.
        output: Folder of the results. A run that was interrupted goes on where it stopped.
        orders: How many seeded shuffles, ``alphabetical``, a published group (``clip_8``), or lists of names.
        checkpoint_class: Experts are whole fine-tuned checkpoints of this class of transformers, not adapters.
        base_sha256: Hash that a local base model's weights must have; None takes any.
        percent: Turns the primary metrics into percent. None where they have no unit in common: then only the
            normalized scores are averaged.
        losses: Whether to measure the stability and plasticity losses of every step.
        activations: Inputs per task, of its validation split without labels, on which the losses on activations are
            measured, too; 0 leaves those out.
        layer_groups: Patterns of layer names by the name of their group, for the affinity of subspaces.
        tables: Folder of tables and figures; None takes ``output``. Several selections of methods can share a folder of
            results, and what one has measured the others need not.

    Raises:
        ConfigError: No method, an order that does not fit, or names that differ.
        MethodError: A method or option is unknown or out of range.
    """

    def __init__(
        self,
        base_model: BaseModel,
        tasks: dict[str, Task],
        experts: dict[str, str | Path] | str,
        methods: dict[str, ContinualForm],
        output: Path,
        orders: Orders = 5,
        checkpoint_class: str | None = None,
        base_sha256: str | None = None,
        percent: float | None = 100.0,
        losses: bool = True,
        activations: int = 0,
        layer_groups: dict[str, list[str]] | None = None,
        tables: Path | None = None,
    ) -> None:
        if isinstance(experts, str):
            if _PLACE not in experts:
                raise ConfigError(f"experts is '{experts}'; expected a mapping, or a pattern that holds {_PLACE}.")
            experts = {task: experts.replace(_PLACE, task) for task in tasks}
        super().__init__(base_model, tasks, experts, base_sha256=base_sha256)
        if not methods:
            raise ConfigError("no methods to test; state at least one under model.methods.")
        if activations < 0:
            raise ConfigError(f"activations is {activations}; expected 0 or more inputs per task.")
        for form in methods.values():
            form.make()
        self.methods, self.folder = dict(methods), Path(output)
        self.orders = task_orders(list(tasks), orders)
        self.checkpoint_class, self.percent = checkpoint_class, percent
        self.losses, self.activations = losses, activations
        self.layer_groups = dict(layer_groups or {})
        self.tables = self.folder if tables is None else Path(tables)
        self.candidates = [_STEP]
        metrics = nn.ModuleList(task.metrics() for task in tasks.values())
        self.metrics = nn.ModuleList([metrics]).requires_grad_(False)
        self.seen: list[str] = []
        self.values: dict[str, dict[str, float]] = {}

    def setup(self, stage: str) -> None:
        """Check names as a benchmark does; leave out tasks that are not seen yet."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._loaded = [tuple(name for name in tasks_of(key) if name in self.seen) for key in data.batch_keys]

    def configure_model(self) -> None:
        """Load base, heads and adapters, once; whole checkpoints are read when they are needed."""
        if hasattr(self, "model"):
            return
        model = load_base_model(*self._source)
        adapters: dict[str, Adapter] = {}
        for name in self.task_names:
            task = self.task_of(name)
            if self.checkpoint_class is None:
                adapters[name], head = read_expert(self.experts[name], name)
                task.load_head(head, name)
            task.check(model)
        self._adapters = on_model(model, adapters)
        self.evaluators = nn.ModuleList(self.task_of(name).evaluator() for name in self.task_names)
        self.model = model

    def expert(self, task: str) -> Adapter:
        """Return a task's expert.

        Raises:
            AdapterError, ConfigError: It cannot be read.
        """
        self.configure_model()
        if self.checkpoint_class is None:
            return self._adapters[task]
        return read_checkpoint(str(self.experts[task]), self.checkpoint_class, task, self.model)

    def made(self, form: ContinualForm, data: LightningDataModule) -> ContinualMethod:
        """Return a method, with model and unlabelled inputs (of the validation split) if it learns."""
        if not form.learns:
            return form.make()
        self.configure_model()
        tasks = {name: self.task_of(name) for name in self.task_names}
        batches = unlabelled(data, form.samples, form.batch_size)
        return form.make(model=self.model, batches=batches, tasks=tasks)

    def score(
        self, trainer: Trainer, data: LightningDataModule, update: Update | Adapter | None, tasks: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Return all metrics by task, on the test split of some tasks, with an update attached to the base model.

        Args:
            trainer: Whose ``test`` is called.
            data: All tasks' data.
            update: A merge, an expert, or None for the plain base.
            tasks: Which ones to test.
        """
        self.configure_model()
        self.seen = list(tasks)
        found: Mapping[str | None, Layers] = {None: {}}
        if isinstance(update, Adapter):
            found = {None: expert_layers(self.model, update, update.name)}
        elif update is not None:
            found = merge_layers(self.model, update, tasks, _STEP)
        self._switch = switch = attach_switch(self.model, {task or _STEP: layers for task, layers in found.items()})
        self._active = {(_STEP, task): task if task in found else _STEP for task in tasks}
        try:
            trainer.test(self, datamodule=SeenData(data, tasks), verbose=False)
        finally:
            switch.detach()
        return self.values

    def on_test_epoch_end(self) -> None:
        """Compute the metrics of the tasks that were tested."""
        (metrics,) = self.metrics
        collections = dict(zip(self.task_names, metrics, strict=True))  # type: ignore[call-overload]
        self.values = {
            task: {name: float(value) for name, value in collections[task].compute().items()} for task in self.seen
        }

    def task_of(self, name: str) -> Task:
        """Return a task by its name."""
        found = self.tasks[self.task_names.index(name)]
        assert isinstance(found, Task)
        return found

    def origin(self, data: LightningDataModule) -> Mapping[str, Any]:
        """Return what the scores came from, for the record: base, experts, heads, data."""
        return {
            "base_model": self.base_model,
            "experts": {name: str(folder) for name, folder in self.experts.items()},
            "checkpoint_class": self.checkpoint_class,
            "heads": {name: self.task_of(name).config() for name in self.task_names},
            "note": getattr(data, "note", None),
            "test_samples": getattr(data, "test_samples", None),
        }
