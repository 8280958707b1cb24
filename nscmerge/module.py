"""MergeModule: learns merge coefficients without labels. Wires the parts and logs; no algebra, no key strings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from nscmerge.accumulation import sum_one_by_one
from nscmerge.adapters import Adapter
from nscmerge.base_model import BaseModel, load_base_model, resolve_source
from nscmerge.batching import TaskKey, fuse, tasks_of
from nscmerge.checkpointing import checkpoint_blocks
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from nscmerge.folding import fold, fold_whole
from nscmerge.merged_linear import MergedModel, attach
from nscmerge.monitor import CoefficientMonitor
from nscmerge.objectives import NSC, Objective
from nscmerge.preflight import preflight
from nscmerge.pretrained import Pretrained
from nscmerge.provenance import learned_recipe
from nscmerge.strategies import check_strategy
from nscmerge.update import Update
from nscmerge.whole import ProjectorCoefficients, WholeLinear, on_model, whole_linears

Batch = Mapping[TaskKey, Mapping[str, Tensor]]


class MergeModule(lightning.LightningModule):
    """Learns one merge coefficient per task and layer by minimising a label-free objective (Algorithm 1 of NSC).

    ``trainer.fit`` learns; every batch is ``{task: {input name: tensor}}``, without labels; tasks that share their
    inputs stand under one key, the tuple of their names. The whole batch runs as one fused forward pass that stops at
    the last target layer, and only the coefficients receive a gradient.

    Args:
        base_model: Frozen base: local folder, hub id, ``package:NAME/FOLDER``, ``timm:NAME``, a :class:`Pretrained`
            for another class than ``AutoModel``, or a module, which is changed in place (:meth:`MergedModel.detach`
            puts it back).
        experts: ``{task: adapter}``; each a PEFT folder, a hub id or an :class:`Adapter`.
        objective: Label-free loss; default :class:`NSC` on the output projections of the last quarter of the blocks.
        init: Start value of every coefficient; the papers' 0.4, or ``weight_average`` for 1 / K.
        granularity: One coefficient per task and ``layer``, or per ``task``.
        bounds: Clamp coefficients to (low, high) in the forward pass; None leaves them free.
        optimizer: From parameters to optimizer; default AdamW with torch defaults (lr 1e-3, weight decay 0.01).
        scheduler: From optimizer to a scheduler that steps with every batch; None keeps the learning rate constant.
        projector_coeff: For linear layers that adapters hold whole (a multimodal projector in ``modules_to_save``): one
            coefficient per task and layer, as the authors' code has it, or per task and parent module.
        accumulate: ``fused`` runs all tasks in one graph; ``task`` builds one graph at a time, of one task or of those
            that share their inputs: same gradient, less memory.
        dtype: Dtype of the base model; None keeps the stored one. Coefficients and geometry stay fp32.
        base_sha256: Hash that a local base model's weights must have; None takes any.
        output: Merge folder to write when the fit ends; must not exist yet. None writes nothing.

    Raises:
        AdapterError, ShapeError: Adapters cannot be read or do not belong together.
        ConfigError: The objective has no meaning for some of the tasks, or ``bounds`` do not hold ``init``.
        OutputExistsError: ``output`` is there already.
    """

    def __init__(
        self,
        base_model: BaseModel,
        experts: Mapping[str, str | Path | Adapter],
        *,
        objective: Objective | None = None,
        init: float | Literal["weight_average"] = 0.4,
        granularity: Literal["layer", "task"] = "layer",
        bounds: tuple[float, float] | None = None,
        projector_coeff: ProjectorCoefficients = "per_linear",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        accumulate: Literal["fused", "task"] = "fused",
        dtype: str | None = None,
        base_sha256: str | None = None,
        output: str | Path | None = None,
    ) -> None:
        super().__init__()
        if output is not None:
            check_absent(output)
        self.experts = preflight({t: resolve_source(e) if isinstance(e, str) else e for t, e in experts.items()})
        self.tasks = list(self.experts)
        layers = sorted({layer for adapter in self.experts.values() for layer in adapter.layers})
        start = 1 / len(self.tasks) if init == "weight_average" else init
        self.coefficients = Coefficients(layers, self.tasks, init=start, granularity=granularity, bounds=bounds)
        self.objective = objective if objective is not None else NSC()
        self.objective.bind(self.experts)
        self.projector_coeff = projector_coeff
        self.whole: list[WholeLinear] = []  # linear layers that adapters hold whole, once the base is there
        self.merged: MergedModel | None = None
        self.unreached: list[str] | None = None
        self._reached: set[int] = set()  # rows of the coefficients that have had a gradient
        self.ratios: list[MeanMetric] = []
        # In a tuple: a model given here is a submodule only once it is attached.
        self._source = (base_model, dtype, base_sha256)
        self._optimizer, self._scheduler = optimizer, scheduler
        self.accumulate, self._output = accumulate, output
        self.started: float | None = None
        self.first_ratios: dict[str, float] = {}  # mean per task, first and latest validation
        self.validation_ratios: dict[str, float] = {}
        # Checkpoints hold the coefficients alone: the base and the adapters are on disk already.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Load the base model and attach the adapters, once."""
        if self.merged is not None:
            return
        model = load_base_model(*self._source)
        if isinstance(self._source[0], Pretrained) and self._source[0].checkpointing:
            checkpoint_blocks(model)
        self.experts = on_model(model, self.experts)
        layers = {task: adapter.layers for task, adapter in self.experts.items()}
        self.objective.prepare(model, layers)
        self.whole = whole_linears(model, self.experts, self.projector_coeff)
        self.coefficients.extend(list(dict.fromkeys(linear.row for linear in self.whole)))
        self.merged = attach(model, layers, self.coefficients, self.whole)
        self.base = model
        # Of the validation inputs, one per task. A module list, so that Lightning moves them to the device.
        self.ratios = [MeanMetric() for _ in self.tasks]
        self.metrics = nn.ModuleList(self.ratios)

    def configure_optimizers(self) -> Any:
        """Hand over the coefficients, and nothing else, to the optimizer."""
        optimizer = self._optimizer(self.coefficients.parameters())
        if self._scheduler is None:
            return optimizer
        scheduler = {"scheduler": self._scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def configure_callbacks(self) -> list[Callback]:
        """Watch the coefficients in whatever logger the trainer has."""
        return [CoefficientMonitor()]

    def train(self, mode: bool = True) -> MergeModule:
        """Keep the frozen base in eval mode: no dropout while coefficients are learned."""
        super().train(mode)
        if self.merged is not None:
            self.merged.model.eval()
        return self

    def setup(self, stage: str) -> None:
        """Check the strategy, and that every expert has inputs, before the base model is loaded.

        Raises:
            ConfigError: The data module has other tasks, or the trainer's strategy cannot learn a merge.
        """
        check_strategy(self.trainer.strategy)
        named = getattr(getattr(self.trainer, "datamodule", None), "task_names", None)
        if named is not None and set(named) != set(self.tasks):
            raise ConfigError(
                f"experts and data name different tasks: only experts: {sorted(set(self.tasks) - set(named))}, "
                f"only data: {sorted(set(named) - set(self.tasks))}. Every expert is merged on its own inputs; make "
                "model.init_args.experts and data.init_args.tasks equal."
            )

    def on_train_start(self) -> None:
        """Refuse a fit that would never end.

        Raises:
            ConfigError: The batches never run out and the trainer has no ``max_steps``.
        """
        if math.isinf(self.trainer.num_training_batches) and self.trainer.max_steps < 1:
            raise ConfigError(
                f"trainer.max_steps is {self.trainer.max_steps}; unlabelled batches never run out. "
                "Set it to the number of steps, for example Trainer(max_steps=100)."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the objective's total over tasks; ``{task: inputs}`` without labels."""
        self._check_tasks(batch)
        losses = self._losses(batch)
        loss = self.objective.total(list(losses.values()))
        # Every coefficient takes part, so that DDP finds no unused parameter; the gradient of this term is zero.
        loss = loss + 0.0 * sum(lam.sum() for lam in self.coefficients.parameters())
        sync = self.trainer.world_size > 1
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=sync)
        self.log_dict(
            {f"{self.objective.quantity}/{task}": value.detach() for task, value in losses.items()}, sync_dist=sync
        )
        return loss

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every task's loss with gradient: all of them in one graph, or graph by graph, each freed at once."""
        merged = self._attached()
        losses: dict[str, Tensor] = {}
        if self.accumulate == "fused":
            for group in fuse(batch):
                losses |= self.objective.losses(merged, group)
            return losses
        for key in batch:
            (group,) = fuse({key: batch[key]})
            found = self.objective.losses(merged, group)
            whole = sum_one_by_one([torch.stack(list(found.values())).sum()], merged.parameters)
            # Their total weighs all tasks alike, so any one of them may carry the gradient of all in this graph.
            losses |= {task: value.detach() + (whole - whole.detach()) / len(found) for task, value in found.items()}
        return losses

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave coefficients that no target can reach without a gradient, so that no optimizer decays them."""
        asleep = [i for i in range(len(self.coefficients.lam)) if i not in self._reached]
        awake = {i for i in asleep if (g := self.coefficients.lam[i].grad) is not None and bool(g.any())}
        self._reached |= awake
        # An objective at rest has no gradient anywhere, which says nothing about reach.
        if awake or (self.unreached is None and self._reached):
            names = self.coefficients.layers if len(self.coefficients.lam) > 1 else ("all layers",)
            self.unreached = [name for i, name in enumerate(names) if i not in self._reached]
        for i in asleep:
            if i not in awake:
                self.coefficients.lam[i].grad = None

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """End the fit where the objective has nothing left to do."""
        if (reason := self.objective.finished()) is not None:
            self.trainer.should_stop = True
            rank_zero_info(f"stopped after {self.trainer.global_step} steps: {reason}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add what the objective reports of each task's inputs to its mean."""
        self._check_tasks(batch)
        for group in fuse(batch):
            for task, value in self.objective.report(self._attached(), group).items():
                rows = group.rows[task]
                self.ratios[self.tasks.index(task)].update(value, rows.stop - rows.start)

    def on_validation_epoch_end(self) -> None:
        """Log the mean of what is reported, per task and over tasks."""
        values = {t: m.compute() for t, m in zip(self.tasks, self.ratios, strict=True) if m.update_called}
        for metric in self.ratios:
            metric.reset()
        if values:
            self.validation_ratios = {task: float(value) for task, value in values.items()}
            self.first_ratios = self.first_ratios or self.validation_ratios
            name = f"val/{self.objective.quantity}"
            self.log_dict({f"{name}/{task}": value for task, value in values.items()}, sync_dist=True)
            self.log(name, torch.stack(list(values.values())).mean(), prog_bar=True, sync_dist=True)

    def on_fit_start(self) -> None:
        """Start the receipt's clock."""
        self.started = time.perf_counter()

    def on_fit_end(self) -> None:
        """Write the merge folder, from one process."""
        if self._output is not None and self.trainer.is_global_zero:
            self.update().save(self._output)
            rank_zero_info(f"merge written to {self._output}")

    def update(self) -> Update:
        """Return the merge as it stands: every task's factors concatenated, lambda and scaling in B (rank R).

        Whole tensors of adapters have a delta only beside the base model, which is then loaded.
        """
        if any(adapter.saved for adapter in self.experts.values()):
            self._attached()
        base = next((a.base_model for a in self.experts.values() if a.base_model), None)
        dense = fold_whole(self.whole, self.coefficients)
        return Update(fold(self.experts, self.coefficients), dense, base, recipe=learned_recipe(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was learned only: megabytes of frozen weights do not belong in every checkpoint."""
        state, own = checkpoint["state_dict"], "objective._extra_state"
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith("coefficients.") or k == own}
        checkpoint["reached"] = sorted(self._reached)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which coefficients have had a gradient."""
        self._reached = set(checkpoint.get("reached", ()))

    def _attached(self) -> MergedModel:
        if self.merged is None:
            self.configure_model()
        assert self.merged is not None  # for the type checker
        return self.merged

    def _check_tasks(self, batch: Batch) -> None:
        if unknown := {task for key in batch for task in tasks_of(key)} - set(self.tasks):
            raise ConfigError(f"the data have tasks {sorted(unknown)} without an expert; experts are {self.tasks}.")
