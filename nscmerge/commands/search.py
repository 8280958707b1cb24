"""``nscmerge search``: choose the scale of closed-form merges; YAML names criteria and data by class path."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence

from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from nscmerge.search import ScaleSearch


def run(args: Sequence[str]) -> None:
    """Run a search, print its tables, and say where the record and the merges are."""
    # LightningCLI still uses names that jsonargparse has renamed; nothing that a user could do about.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    cli = LightningCLI(
        ScaleSearch,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        args=list(args)[1:],
    )
    config = json.loads(cli.parser.dump(cli.config, format="json", skip_validation=True))
    result = cli.model.run(cli.trainer, cli.datamodule, config)
    result.print()
    if cli.model.output is not None:
        print(f"search written to {cli.model.output}")
