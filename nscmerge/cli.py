"""The console script: sends each command to its home, which is imported only then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from nscmerge import __version__
from nscmerge.errors import NSCMergeError


class Command(NamedTuple):
    """One console command: where it lives and what it is for."""

    home: str
    summary: str


COMMANDS = {
    "fit": Command("nscmerge.commands.train", "fine-tune an expert, or learn a merge (LightningCLI; YAML + overrides)"),
    "validate": Command("nscmerge.commands.train", "report the null-space ratio per task of a merge in the making"),
    "test": Command("nscmerge.commands.train", "test experts and merges, write normalized scores"),
    "merge": Command("nscmerge.commands.merge", "closed-form merge of adapters; needs no base model and no data"),
    "continual": Command(
        "nscmerge.commands.continual", "a merge folder that grows, one adapter after another, no data"
    ),
    "doctor": Command("nscmerge.commands.doctor", "preflight in seconds: every fault by name, ranks, overlap, cost"),
    "search": Command(
        "nscmerge.commands.search", "choose the scale of closed-form merges: by validation loss or label-free"
    ),
    "convert": Command("nscmerge.commands.convert", "rewrite a published adapter in another layout as a PEFT folder"),
    "methods": Command("nscmerge.commands.methods", "the table of closed-form methods with options and sources"),
    "report": Command("nscmerge.commands.report", "plots and tables from merge, scores and run folders"),
}


def usage() -> str:
    """Return the help page; built without importing torch, so that it comes at once."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"nscmerge {__version__}: merge LoRA adapters without labels",
            "",
            "usage: nscmerge COMMAND [options]",
            *lines,
            "",
            "nscmerge COMMAND --help lists a command's options; nscmerge --version prints the version.",
        ]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run one command. Errors of ours end with one line on stderr and exit status 1, wrong usage with 2."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    if args[0] == "--version":
        print(f"nscmerge {__version__}")
        return
    if args[0] not in COMMANDS:
        print(f"nscmerge: no command '{args[0]}'. Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    try:
        import_module(COMMANDS[args[0]].home).run(args)
    except (NSCMergeError, OSError, ValueError) as error:
        ours = _cause(error)
        if ours is None:
            raise
        print(f"nscmerge: {ours}", file=sys.stderr)
        raise SystemExit(1) from None


def _cause(error: BaseException | None) -> NSCMergeError | None:
    """Return the error of ours that ``error`` is or was raised from.

    A constructor's error reaches us inside the ValueError by which jsonargparse says that no type of a union fits.
    """
    while error is not None and not isinstance(error, NSCMergeError):
        error = error.__cause__
    return error
