"""``nscmerge merge METHOD``: one sub-command per method, its options read off the method's own signature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from nscmerge.merging import merge
from nscmerge.methods import METHODS, Method


def run(args: Sequence[str]) -> None:
    """Merge adapters and write a merge folder."""
    config = parser().parse_args(list(args)[1:])
    method = config["method"]
    options: dict[str, Any] = config[method].as_dict()
    output = check_absent(options.pop("output"))
    adapters = _named(options.pop("adapters"))
    base = options.pop("base")
    with Console(stderr=True).status(f"merging {len(adapters)} adapters by {method}"):
        update = merge(adapters, method, base=resolve_source(base) if base else None, **options)
        update.save(output)
    print(f"merge written to {output}")


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
    own.add_argument("--output", type=Path, required=True, help="merge folder to write; must not exist")
    own.add_argument("--base", type=str, default=None, help="base weights, only to merge whole tensors")
    own.add_argument("--variant", type=str, default="original", help=f"one of {', '.join(method.variants)}")
    own.add_function_arguments(method.original, skip={"experts", "stack"}, as_group=False)
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
