"""``python -m tasks.continual --config FILE``: run a protocol, or what is left of it, and write its tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from nscmerge.errors import NSCMergeError
from tasks.continual.module import ContinualBenchmark
from tasks.continual.protocol import run
from tasks.continual.report import write_report


def parse(args: Sequence[str] | None = None) -> LightningCLI:
    """Return trainer, module and data module of a configuration (YAML files, later over earlier, and overrides)."""
    # LightningCLI still uses names that jsonargparse has renamed; nothing that a user could do about.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return LightningCLI(
        ContinualBenchmark,
        LightningDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=None,
        run=False,
        args=None if args is None else list(args),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run it. Errors of ours end with one line on stderr and exit status 1, wrong usage with 2."""
    try:
        cli = parse(args)
        results = run(cli.trainer, cli.model, cli.datamodule)
        if cli.trainer.is_global_zero:
            print(write_report(results, cli.model.folder))
    except (NSCMergeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NSCMergeError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"tasks.continual: {cause}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
