"""``nscmerge merge METHOD``: one sub-command per method, its options read off the method's own signature."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from nscmerge.base_files import find_base
from nscmerge.base_model import resolve_source
from nscmerge.console import progress_bars
from nscmerge.errors import ConfigError
from nscmerge.fold_base import FLOATS
from nscmerge.folders import check_absent
from nscmerge.merging import merge
from nscmerge.methods import METHODS, Method
from nscmerge.update import Update

#: What a parser has no words for: the stack itself, and drawn tensors given instead of a seed.
_NOT_WORDS = {"experts", "stack", "keep_masks", "init_perm"}


def run(args: Sequence[str]) -> None:
    """Merge adapters and write a merge folder, or a checkpoint."""
    # Without defaults: those that were not given are the variant's own, which may differ.
    config = parser().parse_args(list(args)[1:], defaults=False)
    method = config["method"]
    options: dict[str, Any] = config[method].as_dict()
    output = check_absent(options.pop("output"))
    adapters = _named(options.pop("adapters"))
    base, fold_into = options.pop("base", None), options.pop("fold_into", None)
    dtype, task = options.pop("dtype", None), options.pop("task", None)
    if fold_into is None and (dtype, task) != (None, None):
        raise ConfigError("--dtype and --task say how a checkpoint is written; give --fold-into BASE with them.")
    if fold_into is not None:
        # Found before any work, and the base of whole tensors too.
        base = base or str(find_base(fold_into).folder)
    with progress_bars() as watch:
        update = merge(adapters, method, base=resolve_source(base) if base else None, watch=watch, **options)
        if fold_into is None:
            update.save(output, watch=watch)
            audit = None
        else:
            audit = update.fold_into(fold_into, output, dtype=dtype, task=task, watch=watch)
    if lost := _lost_by_rank(update):
        print(lost)
    if audit is not None:
        print(f"{'warning: ' if audit.alarming else ''}{audit.summary()}", file=sys.stderr if audit.alarming else None)
    print(f"{'merge' if fold_into is None else 'checkpoint'} written to {output}")


def _lost_by_rank(update: Update) -> str | None:
    """Return a line on what a cut of the rank took, None where nothing was cut."""
    if update.recipe is None or not (errors := update.recipe.relative_error):
        return None
    worst, mean = max(errors, key=lambda name: errors[name]), sum(errors.values()) / len(errors)
    return (
        f"rank cut in {len(errors)} layers: relative error {100 * mean:.2g} % on average, {100 * errors[worst]:.2g} % "
        f"at worst ('{worst}')"
    )


def parser() -> ArgumentParser:
    """Return the parser of ``nscmerge merge``: adapters, output, and the options of each method."""
    top = ArgumentParser(prog="nscmerge merge", description="Closed-form merge of adapters.")
    commands = top.add_subcommands(dest="method")
    for name, method in METHODS.items():
        commands.add_subcommand(name, _method_parser(method), help=str(method.original.__doc__).partition("\n")[0])
    return top


def _method_parser(method: Method) -> ArgumentParser:
    own = ArgumentParser(description=str(method.original.__doc__).partition("\n")[0])
    own.add_argument("adapters", nargs="+", type=str, help="adapter folders or hub ids, or NAME=FOLDER")
    own.add_argument("--output", type=Path, required=True, help="merge folder or checkpoint to write; must not exist")
    own.add_argument("--base", type=str, default=None, help="base weights, only to merge whole tensors")
    own.add_argument("--variant", type=str, default="original", help=f"one of {', '.join(method.variants)}")
    skip: set[str | int] = set(_NOT_WORDS)
    for variant, function in method.variants.items():
        own.add_function_arguments(function, skip=skip, as_group=False)
        skip |= set(method.options(variant))
    if "rank" not in skip:
        own.add_argument("--rank", type=int, default=None, help="cut every layer to this rank; dense ones too")
    if "energy" not in skip:
        help_ = "cut every layer to the smallest rank with this share of its squared singular values"
        own.add_argument("--energy", type=float, default=None, help=help_)
    own.add_argument(
        "--fold-into", type=str, default=None, help="base model (folder or hub id): write a checkpoint of the whole"
    )
    own.add_argument("--dtype", type=str, default=None, help=f"of that checkpoint; one of {', '.join(FLOATS)}")
    own.add_argument("--task", type=str, default=None, help="whose weights, where the method keeps some per task")
    return own


def _named(adapters: Sequence[str]) -> dict[str, str] | list[str]:
    """Return ``{name: folder}`` where names are given, else the folders as they are, which then name themselves."""
    named = ["=" in adapter for adapter in adapters]
    if not any(named):
        return [resolve_source(adapter) for adapter in adapters]
    if not all(named):
        raise ConfigError("some adapters have names and some have not; write NAME=FOLDER for all of them or for none.")
    pairs = [adapter.split("=", 1) for adapter in adapters]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"two adapters have one name: {', '.join(name for name, _ in pairs)}; names must differ.")
    return {name: resolve_source(folder) for name, folder in pairs}
