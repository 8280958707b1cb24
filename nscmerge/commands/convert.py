"""``nscmerge convert``: adapters that were published in LLaVA's or KnOTS' layout, as PEFT folders in safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from nscmerge.base_model import resolve_source
from nscmerge.convert import convert


def run(args: Sequence[str]) -> None:
    """Convert one adapter."""
    options = parser().parse_args(list(args)[1:])
    written = convert(
        resolve_source(options.source),
        options.output,
        heads=options.heads,
        task=options.task,
        base_model=options.base_model,
    )
    print(f"adapter written to {written}")


def parser() -> ArgumentParser:
    """Return the parser of ``nscmerge convert``."""
    own = ArgumentParser(
        prog="nscmerge convert",
        description="Rewrite a published adapter (LLaVA's layout, a pickle, KnOTS' heads) as a PEFT folder.",
    )
    own.add_argument("source", type=str, help="adapter folder or hub id")
    own.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    own.add_argument("--heads", type=str, default=None, help="file of heads by task, or folder or hub id of heads.pt")
    own.add_argument("--task", type=str, default=None, help="whose head of that file is the adapter's")
    own.add_argument("--base_model", type=str, default=None, help="base model that the folder names")
    return own
