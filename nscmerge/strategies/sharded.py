"""The frozen base sharded over processes, block by block; coefficients are trained and synchronised, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nscmerge.checkpointing import blocks
from nscmerge.errors import ConfigError
from nscmerge.quantized import factor_dtype


class ShardedBase(DDPStrategy):
    """Fully sharded data parallelism (FSDP2) for learning a merge, on GPUs and, for tests, on CPUs.

    Every process holds its share of the weights of each block, and gathers a block when it runs. Samples are split over
    processes as in ddp. The coefficients, a few hundred numbers, are whole in every process; their gradients are
    averaged after each backward pass. Blocks are placed one by one, so that a device never holds the whole base; main
    memory does, once per process.

    Processes gather together, so they must run equally many passes: answers are generated in step, and a validation
    whose samples do not divide by the processes is refused.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; None takes the device's own.

    Raises:
        ConfigError: The module is no merge, its base is quantised, or its objective's passes depend on the samples.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)

    def model_to_device(self) -> None:
        """Shard the base, then bring what is left to the device."""
        module: Any = self.lightning_module
        merged = getattr(module, "merged", None)
        if merged is None:
            raise ConfigError(
                f"ShardedBase shards the base of a merge that is being learned, and {type(module).__name__} is none. "
                "Use trainer.strategy ddp, or nscmerge.strategies.SplitBase, to test or to fine-tune."
            )
        if self.world_size > 1 and not module.objective.runs_alike():
            raise ConfigError(
                f"{type(module.objective).__name__} with these options runs as many passes as its samples ask for, and "
                "processes that share a base must run equally many. Use trainer.strategy ddp or "
                "nscmerge.strategies.SplitBase."
            )
        shard(merged.model, self.root_device, self.world_size)
        merged.truncated, merged.together = False, self.world_size > 1
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Nothing: no wrapper, for the gradients of coefficients are averaged in :meth:`post_backward`."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of the coefficients over processes."""
        module: Any = self.lightning_module
        gradients = [p.grad for p in module.coefficients.parameters() if p.grad is not None]
        if not gradients or self.world_size == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= self.world_size
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def on_validation_start(self) -> None:
        """Refuse a validation in which some process would run fewer passes than others, and wait for ever.

        Raises:
            ConfigError: Processes hold unequal numbers of batches.
        """
        module: Any = self.lightning_module
        counts: list[Any] = [None] * self.world_size
        distributed.all_gather_object(counts, list(module.trainer.num_val_batches))
        if len({tuple(own) for own in counts}) > 1:
            raise ConfigError(
                f"processes would validate on {counts} batches; a sharded base wants equally many in all. Set "
                f"data.init_args.val_samples to a multiple of {self.world_size} that every task has."
            )

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, once all processes are known to hold as many inputs of the same tasks.

        Raises:
            ConfigError: They do not.
        """
        mine = {str(task): len(next(iter(inputs.values()))) for task, inputs in args[0].items()}
        everyone: list[Any] = [None] * self.world_size
        distributed.all_gather_object(everyone, mine)
        if any(own != mine for own in everyone):
            raise ConfigError(
                f"in one step of validation the processes hold these samples: {everyone}; a sharded base wants equally "
                f"many in all. Set data.init_args.val_samples to a multiple of {self.world_size} that every task has."
            )
        return super().validation_step(*args, **kwargs)


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Shard every block of a frozen model by itself, and what is left together, over all processes.

    Raises:
        ConfigError: A layer is quantised.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and factor_dtype(module) != module.weight.dtype:
            raise ConfigError(
                f"layer '{name}' is quantised ({module.weight.dtype}), which cannot be sharded. Drop quantize, or hold "
                "the base whole in every process (trainer.strategy ddp) or split (nscmerge.strategies.SplitBase)."
            )
    mesh = init_device_mesh(device.type, (world_size,))
    for block in blocks(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
