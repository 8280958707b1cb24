"""``fit``, ``validate`` and ``test``: LightningCLI in subclass mode; YAML names models and data by class path."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback


class SaveConfigWithLogs(SaveConfigCallback):
    """Saves the resolved configuration beside the logs; without a logger nowhere, rather than where one stands."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run folder."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


def run(args: Sequence[str]) -> None:
    """Run one Trainer command; nothing of a data set or a task is imported here."""
    # LightningCLI still uses names that jsonargparse has renamed; nothing that a user could do about.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveConfigWithLogs,
        save_config_kwargs={"overwrite": True},
        # None where they are the process's own arguments: LightningCLI warns about a second set.
        args=None if list(args) == sys.argv[1:] else list(args),
    )
