"""One suite, loaded once, on which merges are learned and scored again and again."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge import MergeModule
from nscmerge.base_model import load_base_model, resolve_source
from nscmerge.objectives import AnchoredNSC, Objective
from nscmerge.objectives.anchors import Anchors
from tasks.base import Task
from tasks.benchmark import Benchmark
from tasks.metrics import normalized_score

#: Score by task.
Scores = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One fit: which objective, how fast, from where, and which samples in which order."""

    objective: str
    start: float
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.objective}_start{self.start:.3g}_lr{self.lr:g}_seed{self.seed}"


class Part(Benchmark):
    """Scores the experts alone, or the merges alone: what never changes need not be measured again."""

    def __init__(self, *args: Any, merges: Mapping[str, str | Path] | None = None, **options: Any) -> None:
        super().__init__(*args, merges=dict(merges or {}), **options)
        wanted = slice(2, None) if merges else slice(1, 2)  # the base stands first, then the experts
        self.candidates, self.metrics = self.candidates[wanted], self.metrics[wanted]
        self.values: dict[str, Scores] = {}

    def on_test_epoch_end(self) -> None:
        """Keep every candidate's primary metric per task."""
        self.values = {
            candidate: {
                name: float(collection.compute()[task.primary])
                for name, task, collection in zip(self.task_names, self.tasks, metrics, strict=True)
            }
            for candidate, metrics in zip(self.candidates, self.metrics, strict=True)
        }


class Unwatched(MergeModule):
    """A merge in the making without tables and curves."""

    def configure_callbacks(self) -> list[Callback]:
        """Return none."""
        return []


class Snapshots(Callback):
    """Writes the merge as it stands after some of the steps, into ``folder/STEP``."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Write, if this is one of the steps."""
        if trainer.global_step in self.steps:
            self._write(trainer.global_step, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the steps that were not needed: an objective that ended the fit leaves the merge as it is."""
        for step in self.steps:
            if step > trainer.global_step:
                self._write(step, pl_module)

    def _write(self, step: int, module: MergeModule) -> None:
        folder = self.folder / str(step)
        if not folder.exists():  # from an interrupted study
            module.update().save(folder)


class Suite:
    """Base model, experts, data and tasks, read once per process.

    Args:
        base_model: Frozen base, as :class:`nscmerge.MergeModule` takes it.
        tasks: Head, prediction and metrics by task.
        experts: Expert folder by task.
        data: Unlabelled inputs and held-out samples; its ``seed`` is that of the cell.
        base_sha256: Hash that the base model's weights must have.
    """

    def __init__(
        self,
        base_model: str,
        tasks: dict[str, Task],
        experts: dict[str, str],
        data: JointDataModule,
        base_sha256: str | None = None,
    ) -> None:
        self.base: nn.Module = load_base_model(base_model, None, base_sha256)
        self.tasks, self.data = tasks, data
        self.experts = {task: resolve_source(source) for task, source in experts.items()}
        self._expert_values: Scores | None = None
        # By choice of targets: the experts do not change, so neither do their ratios.
        self._anchors: dict[str, Anchors] = {}

    def learn(self, cell: Cell, objective: Objective, steps: Sequence[int], folder: Path) -> float:
        """Learn the merge of ``cell`` and write it to ``folder/STEP`` after each of ``steps``; seconds that it took."""
        started = time.perf_counter()
        self.data.seed = cell.seed
        objective = copy.deepcopy(objective)
        if isinstance(objective, AnchoredNSC):
            objective.anchors = self._anchors.setdefault(f"{objective.blocks} {objective.projections}", Anchors())
        module = Unwatched(
            copy.deepcopy(self.base),
            self.experts,
            objective=objective,
            init=cell.start,
            optimizer=partial(torch.optim.AdamW, lr=cell.lr),
        )
        self._trainer(max_steps=max(steps), callbacks=[Snapshots(folder, steps)]).fit(module, self.data)
        return time.perf_counter() - started

    def scores(self, merges: Mapping[str, Path]) -> dict[str, Scores]:
        """Return the score of every merge on every task, in percent of the task's own expert."""
        expert = self.expert_values()
        return {
            merge: {
                name: normalized_score(values[name], expert[name], task.higher_is_better)
                for name, task in self.tasks.items()
            }
            for merge, values in self._score(merges).items()
        }

    def expert_values(self) -> Scores:
        """Return every expert's primary metric on its own test samples, measured once."""
        if self._expert_values is None:
            (self._expert_values,) = self._score().values()
        return self._expert_values

    def _score(self, merges: Mapping[str, Path] | None = None) -> dict[str, Scores]:
        benchmark = Part(copy.deepcopy(self.base), self.tasks, dict(self.experts), merges=merges)
        self._trainer().test(benchmark, self.data, verbose=False)
        return benchmark.values

    def _trainer(self, **options: Any) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **options,
        )
