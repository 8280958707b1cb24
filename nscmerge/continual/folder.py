"""A merge folder that grows: each expert that comes is absorbed, and the folder is always the old or the new merge.

Every step is a directory of its own that never changes (:mod:`nscmerge.continual.state_files`); which one counts is one
name, replaced in one rename (:mod:`nscmerge.continual.pointer`). A process may be killed at any moment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from nscmerge.adapters import Adapter, load_adapter
from nscmerge.aligned import aligned
from nscmerge.continual import make
from nscmerge.continual.kinds import ContinualMethod
from nscmerge.continual.measures import measure
from nscmerge.continual.pointer import STEPS, current_step, switch, tidy
from nscmerge.continual.state import State
from nscmerge.continual.state_files import (
    Measures,
    Record,
    check_sums,
    is_state_file,
    listed_files,
    read_record,
    write_record,
)
from nscmerge.errors import AdapterError, NSCMergeError, OutputError
from nscmerge.factors import LowRank
from nscmerge.folders import check_absent, new_folder, unwritable
from nscmerge.progress import Watch, quiet

T = TypeVar("T")


def start_folder(
    folder: str | Path,
    method: ContinualMethod,
    first: Adapter | str | Path,
    *,
    measured: bool = True,
    watch: Watch = quiet,
) -> State:
    """Make a growing folder from the first expert and return its state.

    Args:
        folder: Folder to make.
        method: From :func:`nscmerge.continual.make`.
        first: An adapter, its folder or its hub id.
        measured: Whether :func:`~nscmerge.continual.measures.measure` looks at the step, for ``show``; costs little on
            factors, up to some randomised SVDs per matrix on dense ones.
        watch: Wraps loops over names, to show progress.

    Raises:
        OutputExistsError: ``folder`` is there already.
        OutputError: The disk is full, or may not be written.
        AdapterError: The expert cannot be read or merged.
    """
    check_absent(folder)
    first = first if isinstance(first, Adapter) else load_adapter(first)
    state = method.start(first, watch=watch)
    measures = [measure(None, first, state, watch) if measured else {}]
    return save_state(state, folder, method, measures=measures, watch=watch)


def save_state(
    state: State,
    folder: str | Path,
    method: ContinualMethod | None = None,
    *,
    measures: Sequence[Measures] = (),
    watch: Watch = quiet,
) -> State:
    """Write a state as a new growing folder, and return it as it reads back.

    Args:
        state: A state of one expert at least.
        folder: Folder to make; appears whole or not at all.
        method: The one that made the state; made again from the state's options if None.
        measures: One entry per step, for ``show``; may be left out.
        watch: Wraps loops over names.

    Raises:
        OutputExistsError: ``folder`` is there already.
        OutputError: The disk is full, or may not be written.
    """
    path = Path(folder)
    with _disk(path), new_folder(path) as partial:
        step = _write_step(Record(state, measures), method or _method(state), partial, watch)
        switch(partial, step, _shown(step, f"merge folder {path}"))
    return load_state(path)


def load_state(folder: str | Path) -> State:
    """Return the state of a growing folder, its hashes checked; tensors are read when asked for, so it has to stay.

    Raises:
        AdapterError: No such folder; damaged; or written by a newer version.
    """
    return load_record(folder).state


def load_record(folder: str | Path) -> Record:
    """Return state and measures of a growing folder; errors as in :func:`load_state`."""
    path = _existing(folder)
    return _of_current(path, lambda step: read_record(step, f"merge folder {path}"))


def append_to(
    folder: str | Path, adapter: Adapter | str | Path, *, measured: bool = True, watch: Watch = quiet, **objects: Any
) -> State:
    """Absorb one more expert into a growing folder, which is the old merge until the new one is complete on the disk.

    Needs the folder and the expert, and none of the earlier ones.

    Args:
        folder: From :func:`save_state` or ``nscmerge continual start``.
        adapter: The next expert, its folder or its hub id. Layers that it spells differently, as its base model was
            wrapped differently, get the merge's names.
        measured: Whether :func:`~nscmerge.continual.measures.measure` looks at the step, for ``show``; costs little on
            factors, up to some randomised SVDs per matrix on dense ones.
        watch: Wraps loops over names, to show progress.
        **objects: What the method needs beside its settings and no folder can hold (NUFILT's ``init``, a model).

    Raises:
        AdapterError, ShapeError: The expert is in already, belongs to another base model, or cannot be merged; or the
            folder is damaged, or written by a newer version. The folder is unchanged.
        OutputError: The disk is full; another process is appending. The folder is unchanged.
    """
    path = _existing(folder)
    who = f"merge folder {path}"
    expert = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    with _locked(path), _disk(path):
        step = current_step(path)
        record = read_record(step, who)
        before = _shown(step, who)
        if (tidied := tidy(path, record.state.t, before)) != step:
            record = read_record(tidied, who)
        method = _method(record.state, objects)
        expert = _spelled_as(record.state, expert)
        state = method.append(record.state, expert, watch=watch)
        measures = [*record.measures, measure(record.state, expert, state, watch) if measured else {}]
        step = _write_step(Record(state, measures), method, path, watch)
        try:
            # Read back and checked before it counts.
            new = read_record(step, who).state
            after = _shown(step, who)
            switch(path, step, after, before)
        except BaseException:
            # On a full disk a step that does not count is in the way.
            if current_step(path) != step:
                shutil.rmtree(step, ignore_errors=True)
            raise
        # The new merge counts by now, so whatever cannot be removed is left to the next step.
        with suppress(OSError):
            tidy(path, state.t, after)
        return new


def export(folder: str | Path, output: str | Path) -> Path:
    """Copy the merge out of a growing folder, as a plain merge folder without a state, and return its path.

    Raises:
        OutputExistsError: ``output`` is there already.
        OutputError: The disk is full, or may not be written.
        AdapterError: The growing folder is damaged.
    """
    path = _existing(folder)
    check_absent(output)

    def copy(step: Path, new: Path) -> None:
        for name in check_sums(step, f"merge folder {path}"):
            if not is_state_file(name):
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(step / name, new / name)

    with _disk(Path(output)), new_folder(output) as partial:
        _of_current(path, lambda step: copy(step, partial))
    return Path(output)


def _of_current(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what ``read`` makes of the step that counts; again if another process put a new one in its place."""
    step = current_step(folder)
    try:
        return read(step)
    except (AdapterError, OSError):
        if (newer := current_step(folder)) == step:
            raise
        return read(newer)


def _write_step(record: Record, method: ContinualMethod, folder: Path, watch: Watch) -> Path:
    """Write one step, flushed to disk, and return its directory; it does not count yet."""
    step = folder / STEPS / f"{record.state.t:04d}"
    with new_folder(step) as partial:
        write_record(record, method.update(record.state), partial, watch)
    return step


def _shown(step: Path, who: str) -> list[str]:
    """Return the names of a step's merge, as the top of the folder shows them: files, and directories of tasks."""
    return sorted({name.partition("/")[0] for name in listed_files(step, who) if not is_state_file(name)})


def _existing(folder: str | Path) -> Path:
    if not (path := Path(folder)).is_dir():
        raise AdapterError(
            f"merge folder {path} is not there. Check the path, or make it: nscmerge continual start METHOD "
            f"--adapter A --output {path}.",
            "not-found",
        )
    return path


def _method(state: State, objects: Mapping[str, Any] | None = None) -> ContinualMethod:
    return make(state.method, state.variant, **{**state.options, **(objects or {})})


def _spelled_as(state: State, expert: Adapter) -> Adapter:
    """Return the expert with the names that the merge has for its layers and tensors."""
    layers = {
        name: LowRank(torch.empty(0, state.shapes[name][1]), torch.empty(state.shapes[name][0], 0))
        for name in state.layers
    }
    tensors = {name: torch.empty(0) for name in state.shapes if name not in layers}
    # Under a name that no task can have beside the expert's own.
    renamed = aligned({"": Adapter(layers, dense=tensors), expert.name or "expert": expert})
    return list(renamed.values())[-1]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from appending meanwhile. The system lets go of the lock when a process ends, however.

    Raises:
        OutputError: Another process is at it.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"merge folder {folder}: another process is appending to it. Wait until it is done, then do it again."
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say it in our words where the disk is full or read-only.

    Raises:
        OutputError: It is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, NSCMergeError) or not unwritable(error):
            raise
        raise OutputError(
            f"merge folder {folder}: the disk cannot be written ({error}). What was there is unchanged. Free some "
            "space, and do it again."
        ) from error
