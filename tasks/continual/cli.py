"""How the commands of this package read their configuration, and how they end on errors of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from nscmerge.errors import NSCMergeError
from tasks.continual.module import ContinualBenchmark


def parse(args: Sequence[str] | None = None) -> LightningCLI:
    """Return trainer, module and data module of a configuration (YAML files, later over earlier, and overrides).

    Args:
        args: Words of the command line; None takes the process's own.
    """
    # LightningCLI still uses names that jsonargparse has renamed; nothing that a user could do about.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return LightningCLI(
        ContinualBenchmark,
        LightningDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=None,
        run=False,
        # None where they are the process's own arguments: LightningCLI warns about a second set.
        args=None if args is None or list(args) == sys.argv[1:] else list(args),
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr and exit status 1 where an error of ours leaves the block."""
    try:
        yield
    except (NSCMergeError, ValueError) as error:
        # A constructor's error reaches us inside the ValueError by which jsonargparse says that no type fits.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NSCMergeError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"tasks.continual: {cause}", file=sys.stderr)
        raise SystemExit(1) from None
