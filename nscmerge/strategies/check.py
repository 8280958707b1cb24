"""Refuse those of Lightning's strategies that shard coefficients with the base, or cannot bear a pass cut short."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from nscmerge.errors import ConfigError


def check_strategy(strategy: Strategy) -> None:
    """Raise unless a merge can be learned under ``strategy``: one device, ddp, and our own can.

    Raises:
        ConfigError: It is Lightning's fsdp, model parallel or DeepSpeed; the message names ours.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"{type(strategy).__name__} would shard the coefficients as well, and stumbles over a forward pass that "
            "ends at the last target layer. To shard the frozen base over processes set trainer.strategy to "
            "nscmerge.strategies.ShardedBase (configs/trainer/fsdp.yaml); to split its blocks over the devices of one "
            "process, nscmerge.strategies.SplitBase (configs/trainer/model_parallel.yaml)."
        )
