"""Test experts and merges on every task of a suite in one ``trainer.test``, each task with its own head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import LightningModule
from torch import nn
from torchmetrics import Metric, SumMetric

from nscmerge.adapters import Adapter
from nscmerge.base_model import BaseModel, load_base_model, source_of, weights_sha256
from nscmerge.batching import tasks_of
from nscmerge.candidates import ClosedForm, expert_layers, merge_layers, read_merge
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from nscmerge.heads import predictions
from nscmerge.pretrained import Pretrained
from nscmerge.switch import Layers, Switch, attach_switch, by_update
from nscmerge.update import Update
from nscmerge.whole import on_model
from tasks.base import Task
from tasks.expert import described, read_expert, seed, versions
from tasks.record import training_of
from tasks.scores import BASE, EXPERT, NOTE, NOTES, Scores, TaskInfo


class Benchmark(LightningModule):
    """Scores the plain base, every task's expert and every merge, and writes them as a scores folder.

    ``trainer.test(benchmark, datamodule=joint)``: the data module has ``task_names`` and one labelled loader per task.
    Every process counts its own share of the samples; metrics are added up over processes before they are computed.

    Args:
        base_model: Frozen base, as :func:`nscmerge.base_model.load_base_model` reads it.
        tasks: Head, prediction and metrics by task name; the weights of the head come from the expert, if it has one.
        experts: Adapter by task name: expert folder, hub id, or ``package:NAME/FOLDER``. What it holds whole (a
            multimodal projector, biases, norms) is switched on with it.
        merges: By the name that the tables show: a merge folder, any PEFT adapter folder, or a :class:`ClosedForm` to
            make of the experts (``{method: ties, lam: 0.5}``).
        base_sha256: Hash that a local base model's weights must have; None takes any.
        output: Scores folder to write; must not exist. None only prints.
        groups: Name of the group, such as its data set, by task: the mean over each group is reported, too.

    Attributes:
        scores: The result, on every process, after the test.

    Raises:
        OutputExistsError: ``output`` is there already.
        ConfigError: Tasks and experts differ, a merge is named like the base or the experts, or a group is given for a
            task that is not there.
    """

    scores: Scores | None = None
    model: nn.Module

    def __init__(
        self,
        base_model: BaseModel,
        tasks: dict[str, Task],
        experts: dict[str, str | Path],
        merges: dict[str, ClosedForm | str | Path] | None = None,
        base_sha256: str | None = None,
        output: Path | None = None,
        groups: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if output is not None:
            check_absent(output)
        if not tasks:
            raise ConfigError("no tasks to test; state at least one under model.init_args.tasks.")
        _same_names("experts", experts, "tasks", tasks, "model.init_args.experts")
        if taken := sorted({BASE, EXPERT} & set(merges or {})):
            raise ConfigError(f"a merge is named '{taken[0]}', which the table uses itself; give it another name.")
        self.base_model = source_of(base_model)
        self.groups = dict(groups or {})
        # In a tuple: a module given here is not a submodule before the test.
        self._source = (base_model, None, base_sha256)
        self.task_names = list(tasks)
        if strange := sorted(set(self.groups) - set(tasks)):
            raise ConfigError(f"groups are given for {strange}, which are no tasks here: {self.task_names}.")
        self.tasks = nn.ModuleList(tasks.values())
        self.experts, self.merges, self.output = dict(experts), dict(merges or {}), output
        self.candidates = [BASE, EXPERT, *self.merges]
        # Task names may hold dots, which nn.ModuleDict refuses; hence lists and numbers.
        self.metrics = nn.ModuleList(
            nn.ModuleList(task.metrics() for task in tasks.values()) for _ in self.candidates
        ).requires_grad_(False)
        self.samples = nn.ModuleList(SumMetric() for _ in tasks)

    def setup(self, stage: str) -> None:
        """Check that data and benchmark speak of the same tasks.

        Raises:
            ConfigError: They do not, or there is no data module.
        """
        data = self.trainer.datamodule
        if data is None or not hasattr(data, "task_names"):
            raise ConfigError("the benchmark needs a data module with task_names, such as datamodules.joint.")
        _same_names("data", data.task_names, "benchmark", self.task_names, "data.init_args.tasks")
        self._loaded = [tasks_of(key) for key in getattr(data, "batch_keys", data.task_names)]

    def configure_model(self) -> None:
        """Load base, experts, heads and merges, once."""
        if hasattr(self, "model"):
            return
        adapters = {}
        for name, task in zip(self.task_names, self.tasks, strict=True):
            adapters[name], head = read_expert(self.experts[name], name)
            task.load_head(head, name)
        # A closed form needs the deltas of whole tensors, and those need the base; all else is read before it.
        whole = any(adapter.saved for adapter in adapters.values())
        later = {name: merge for name, merge in self.merges.items() if whole and isinstance(merge, ClosedForm)}
        updates = {name: read_merge(merge, adapters) for name, merge in self.merges.items() if name not in later}
        _same_base(adapters, updates)
        model = load_base_model(*self._source)
        for task in self.tasks:
            task.check(model)
        self.evaluators = nn.ModuleList(task.evaluator() for task in self.tasks)
        adapters = on_model(model, adapters)
        updates |= {name: read_merge(merge, adapters) for name, merge in later.items()}
        self._switch, self._active = self._attach(model, adapters, updates)
        self.model = model

    def _attach(
        self, model: nn.Module, adapters: Mapping[str, Adapter], updates: Mapping[str, Update]
    ) -> tuple[Switch, dict[tuple[str, str], str | None]]:
        """Return the switch, and what to activate for every candidate and task."""
        updates_by_key: dict[str, Layers] = {}
        active: dict[tuple[str, str], str | None] = {(BASE, task): None for task in self.task_names}
        for task, adapter in adapters.items():
            active[EXPERT, task] = key = f"{EXPERT}/{task}"
            updates_by_key[key] = expert_layers(model, adapter, task)
        for name, update in updates.items():
            for task, layers in merge_layers(model, update, self.task_names, name).items():
                key = f"merge/{name}" if task is None else f"merge/{name}/{task}"
                updates_by_key[key] = layers
                active |= {(name, t): key for t in self.task_names if task in (None, t)}
        return attach_switch(model, updates_by_key), active

    def on_test_epoch_start(self) -> None:
        """Start counting at zero, also in a second test of one object.

        Resetting also gives every process states of its own: spawned processes start with shared ones.
        """
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of every candidate, by one pass for the tasks that share batch and update."""
        names, target = self._loaded[dataloader_idx], batch["target"]
        inputs = {key: value for key, value in batch.items() if key != "target"}
        for candidate, metrics in zip(self.candidates, self.metrics, strict=True):
            for update, together in by_update({name: self._active[candidate, name] for name in names}).items():
                self._switch.activate(update)
                heads = {name: self.evaluators[self.task_names.index(name)] for name in together}
                for name, prediction in predictions(self.model, heads, inputs):
                    own = target[name] if isinstance(target, Mapping) else target
                    metrics[self.task_names.index(name)].update(prediction, own)
        self._switch.activate(None)
        size = len(next(iter(inputs.values())))
        for name in names:
            self.samples[self.task_names.index(name)].update(size)

    def on_test_epoch_end(self) -> None:
        """Compute, print and write the scores."""
        values = {
            candidate: {
                task: {metric: float(value) for metric, value in collection.compute().items()}
                for task, collection in zip(self.task_names, metrics, strict=True)
            }
            for candidate, metrics in zip(self.candidates, self.metrics, strict=True)
        }
        tasks = {
            name: TaskInfo(task.primary, task.higher_is_better, int(samples.compute()), self.groups.get(name))
            for name, task, samples in zip(self.task_names, self.tasks, self.samples, strict=True)
        }
        self.scores = Scores.of(tasks, values, self._origin())
        if self.trainer.is_global_zero:
            if self.output is not None:
                self.scores.write(self.output)
            self.scores.print()
            if self.output is not None:
                print(f"scores written to {self.output}")

    def _origin(self) -> dict[str, Any]:
        """What the scores came from: base, experts and how they were made, merges, data, versions, seed."""
        data = self.trainer.datamodule
        note = getattr(data, "note", None)
        notes = {name: said for name, task in zip(self.task_names, self.tasks, strict=True) if (said := task.notes())}
        return {
            **({NOTE: note} if note is not None else {}),
            **({NOTES: notes} if notes else {}),
            **_base_record(*self._source),
            "experts": {name: str(folder) for name, folder in self.experts.items()},
            "training": {name: training_of(folder) for name, folder in self.experts.items()},
            "merges": {n: _recorded(m) if isinstance(m, ClosedForm) else str(m) for n, m in self.merges.items()},
            "heads": {name: task.config() for name, task in zip(self.task_names, self.tasks, strict=True)},
            "data_module": described(data),
            "versions": versions(),
            "seed": seed(),
        }


def _base_record(base: BaseModel, dtype: str | None, sha256: str | None) -> dict[str, Any]:
    """Return what a record says of the base model: name, hash, and the form that it was held in."""
    if isinstance(base, nn.Module):
        return {"base_model": source_of(base), "base_sha256": sha256}
    record: dict[str, Any] = {"base_model": source_of(base)}
    if isinstance(base, Pretrained):
        sha256 = sha256 or base.sha256
        record["base_form"] = {name: value for name, value in asdict(base).items() if name not in ("source", "sha256")}
    return {**record, "base_sha256": sha256 or weights_sha256(base)}


def _recorded(merge: ClosedForm) -> dict[str, Any]:
    return {name: value for name, value in asdict(merge).items() if value is not None}


def _same_names(what: str, names: Iterable[str], of: str, others: Iterable[str], option: str) -> None:
    """Raise unless two collections of task names hold the same ones, in whatever order."""
    got, expected = set(names), set(others)
    if got != expected:
        raise ConfigError(
            f"{what} and {of} name different tasks: only in {what}: {sorted(got - expected)}, "
            f"only in {of}: {sorted(expected - got)}. Make them equal; see {option}."
        )


def _same_base(adapters: Mapping[str, Adapter], updates: Mapping[str, Update]) -> None:
    """Raise unless all experts and merges that name a base model name the same one."""
    named = {f"expert '{name}'": adapter.base_model for name, adapter in adapters.items()}
    named |= {f"merge '{name}'": update.base_model for name, update in updates.items()}
    known = [(owner, base) for owner, base in named.items() if base is not None]
    for owner, base in known[1:]:
        if base != known[0][1]:
            raise ConfigError(
                f"{owner} was made for the base model '{base}', {known[0][0]} for '{known[0][1]}'; "
                "a benchmark compares updates of one base model."
            )
