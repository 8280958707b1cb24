"""``nscmerge continual start | append | show | export``: a merge folder that takes in one expert after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from nscmerge.adapter_files import read_base
from nscmerge.adapters import Adapter, load_adapter
from nscmerge.base_model import resolve_source
from nscmerge.commands.doctor import split
from nscmerge.console import progress_bars
from nscmerge.continual import METHODS, ContinualMethod, make
from nscmerge.continual.checkpoint import is_checkpoint, load_checkpoint, pick_linear
from nscmerge.continual.folder import append_to, export, load_state, start_folder
from nscmerge.continual.show import print_report, report
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent


def run(args: Sequence[str]) -> None:
    """Start a growing merge, let it grow, look at it, take the merge out of it."""
    # Without defaults: an option that was not given is the method's own to choose.
    options = parser().parse_args(list(args)[1:], defaults=False).as_dict()
    command = options["command"]
    {"start": _start, "append": _append, "show": _show, "export": _export}[command](options[command])


def _start(options: dict[str, Any]) -> None:
    name = options["method"]
    given = dict(options[name])
    source, output = given.pop("adapter"), check_absent(given.pop("output"))
    expert = {key: given.pop(key, None) for key in ("base", "linear")}
    measured = given.pop("measure", True)
    method = make(name, given.pop("variant", "default"), **given)
    with progress_bars() as watch:
        start_folder(output, method, _load(source, expert), measured=measured, watch=watch)
    print(f"merge of 1 expert written to {output}; the next: nscmerge continual append {output} --adapter NEXT")


def _append(options: dict[str, Any]) -> None:
    folder, source = options["folder"], options["adapter"]
    # Refuses a folder that is none, or damaged, before an adapter is downloaded.
    load_state(folder)
    with progress_bars() as watch:
        expert = _load(source, options)
        state = append_to(folder, expert, measured=options.get("measure", True), watch=watch)
    print(f"merge folder {folder} holds {state.t} experts now: {', '.join(one.name for one in state.absorbed)}")


def _show(options: dict[str, Any]) -> None:
    everything = options.get("all_layers", False)
    found = report(options["folder"], layers=everything)
    if options.get("format") == "json":
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print_report(found, Console())


def _export(options: dict[str, Any]) -> None:
    folder, output = options["folder"], check_absent(options["output"])
    base, dtype = options.get("fold_into"), options.get("dtype")
    if base is None:
        if dtype is not None:
            raise ConfigError("--dtype says how a checkpoint is written; give --fold-into BASE with it.")
        print(f"merge written to {export(folder, output)}")
        return
    from nscmerge.update import load_update

    state = load_state(folder)
    with progress_bars() as watch:
        audit = load_update(folder).fold_into(resolve_source(base), output, dtype=dtype, watch=watch)
    print(audit.summary())
    print(f"checkpoint with {state.t} experts written to {output}")


def _load(source: str, options: dict[str, Any]) -> Adapter:
    """Return the expert of ``FOLDER`` or ``NAME=FOLDER``: an adapter, or with its base a whole checkpoint's deltas."""
    name, place = split(source)
    place, base, linear = resolve_source(place), options.get("base"), options.get("linear") or ()
    if is_checkpoint(place):
        if base is None:
            raise ConfigError(
                f"'{place}' holds whole weights and no adapter; give --base with the model that it was fine-tuned from."
            )
        return load_checkpoint(place, resolve_source(base), name=name, linear=linear)
    adapter = load_adapter(place, name=name)
    if linear:
        shapes = {tensor: tuple(adapter.dense[tensor].shape) for tensor in adapter.dense}
        adapter = replace(adapter, linear=pick_linear(shapes, linear, f"adapter '{adapter.name}'"))
    if base is None or not adapter.saved:
        return adapter
    return adapter.on_base(read_base(Path(resolve_source(base)), sorted(adapter.saved)))


def parser() -> ArgumentParser:
    """Return the parser of ``nscmerge continual``: four sub-commands, and under ``start`` one per method."""
    top = ArgumentParser(
        prog="nscmerge continual",
        description="Merge adapters that arrive one after another; none is kept, and no data is needed.",
    )
    commands = top.add_subcommands(dest="command")
    learned = ", ".join(name for name, method in METHODS.items() if _needs_model(method))
    more = f" Methods that learn from unlabelled inputs ({learned}): Python only." if learned else ""
    start = ArgumentParser(description=f"Make a growing merge folder from the first adapter.{more}")
    # The parser wants a sub-command's own sub-commands only after it is in its place.
    commands.add_subcommand("start", start, help="make a growing merge folder from the first adapter")
    methods = start.add_subcommands(dest="method")
    for name, method in METHODS.items():
        if not _needs_model(method):
            methods.add_subcommand(name, _method_parser(method), help=_summary(method))
    commands.add_subcommand("append", _append_parser(), help="absorb the next adapter into it")
    commands.add_subcommand("show", _show_parser(), help="what was absorbed, in which order, and what it did")
    commands.add_subcommand("export", _export_parser(), help="the merge alone, as an adapter or a checkpoint")
    return top


def _needs_model(method: type[ContinualMethod]) -> bool:
    """True for methods that learn from unlabelled inputs: no command line can give them a model and a data loader."""
    return "model" in method.OBJECTS


def _method_parser(method: type[ContinualMethod]) -> ArgumentParser:
    own = ArgumentParser(description=_summary(method))
    _adapter_arguments(own)
    own.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    own.add_argument("--variant", type=str, default="default", help=f"one of {', '.join(method.VARIANTS)}")
    own.add_class_arguments(method, skip={"variant", *method.OBJECTS}, as_group=False)
    return own


def _append_parser() -> ArgumentParser:
    own = ArgumentParser(description="Absorb one more adapter. Needs the folder and the adapter, no earlier one.")
    own.add_argument("folder", type=Path, help="growing merge folder")
    _adapter_arguments(own)
    return own


def _show_parser() -> ArgumentParser:
    own = ArgumentParser(description="What was absorbed, in which order; ranks, overlaps, stability, plasticity.")
    own.add_argument("folder", type=Path, help="growing merge folder")
    own.add_argument("--format", type=Literal["table", "json"], default="table", help="tables, or JSON for scripts")
    own.add_argument("--all_layers", action="store_true", help="every layer of the last step (JSON: of every step)")
    return own


def _export_parser() -> ArgumentParser:
    own = ArgumentParser(description="Write the merge as a plain merge folder (a PEFT adapter where it is low-rank).")
    own.add_argument("folder", type=Path, help="growing merge folder")
    own.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    own.add_argument("--fold-into", type=str, default=None, help="base model: write a checkpoint of the whole")
    own.add_argument("--dtype", type=str, default=None, help="of that checkpoint")
    return own


def _adapter_arguments(own: ArgumentParser) -> None:
    help_ = "adapter folder or hub id, or NAME=FOLDER; with --base also the folder of a whole fine-tuned checkpoint"
    own.add_argument("--adapter", type=str, required=True, help=help_)
    own.add_argument("--base", type=str, default=None, help="base weights, only to merge whole tensors or checkpoints")
    help_ = "of whole checkpoints: names or patterns of the modules that are nn.Linear, as a list; '[\"*\"]' for all"
    own.add_argument("--linear", type=list[str] | None, default=None, help=help_)
    help_ = "overlaps, stability and plasticity for show; takes a while on dense matrices"
    own.add_argument("--measure", type=bool, default=True, help=help_)


def _summary(method: type[ContinualMethod]) -> str:
    return str(method.__doc__).partition("\n")[0]
