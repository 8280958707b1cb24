"""Which step of a growing folder counts: one name, replaced in one rename, and the files that follow it.

    folder/
      current -> steps/0003                 what counts; replaced by one rename
      steps/0003/                           state and merge of three experts; never changed once it is there
      adapter_model.safetensors -> current/adapter_model.safetensors     and so on: the folder is a merge folder too

Links at the top go through ``current``, so that the whole merge changes in the same instant. On disks without symbolic
links ``current`` is a text file and the files at the top are copies, made after the switch.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from nscmerge.continual.state_files import SUMS
from nscmerge.errors import AdapterError, OutputError

CURRENT = "current"
STEPS = "steps"
_PARTIAL = ".partial"
#: What a system says that has no symbolic links, or lets nobody make them.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def current_step(folder: Path) -> Path:
    """Return the directory of the step that counts.

    A copy of the folder made with its links followed has a directory ``current``, or none; then that, or the last
    complete step, counts.

    Raises:
        AdapterError: This is no growing merge folder, or ``current`` names something else than a step.
    """
    link = folder / CURRENT
    if link.is_symlink() or link.is_file():
        named = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(rf"{STEPS}/\d{{4,}}", named) or not (folder / named).is_dir():
            raise AdapterError(
                f"merge folder {folder}: '{CURRENT}' names {named[:80]!r}, expected an existing {STEPS}/NNNN; the "
                f"folder is damaged. Nothing was changed. Take it from a backup, or start again.",
                "state-damaged",
            )
        return folder / named
    if link.is_dir():
        return link
    if complete := [step for step in _steps(folder) if (step / SUMS).is_file()]:
        return complete[-1]
    raise AdapterError(
        f"{folder} is no growing merge folder (it has no '{CURRENT}'). Make one: nscmerge continual start METHOD "
        "--adapter A --output FOLDER.",
        "not-found",
    )


def switch(folder: Path, step: Path, files: Collection[str], before: Collection[str] = ()) -> None:
    """Let ``step`` count from now on: until the rename the old step does, after it the new one, wholly.

    Args:
        folder: The growing folder.
        step: A complete directory in its ``steps``, flushed to disk.
        files: Names in ``step`` that are to be seen at the top.
        before: Names that were seen there so far.
    """
    named = f"{STEPS}/{step.name}"
    links = _replace_by_link(folder / CURRENT, named, only_try=True)
    if links:
        # Names that are new dangle until the rename, names that are gone after it: both read as absent.
        for name in sorted(files):
            if not (folder / name).is_symlink():
                _replace_by_link(folder / name, f"{CURRENT}/{name}")
        _replace_by_link(folder / CURRENT, named)
    else:
        _replace_by_text(folder / CURRENT, f"{named}\n")
    _sync(folder)
    # The new step counts by now. What is left over dangles, and the next step removes it.
    with suppress(OSError):
        for name in sorted(set(before) - set(files)):
            _remove(folder / name)
    if not links:
        _copy_to_top(folder, step, files)


def _copy_to_top(folder: Path, step: Path, files: Collection[str]) -> None:
    try:
        for name in sorted(files):
            _replace_by_copy(folder / name, step / name)
        _sync(folder)
    except OSError as error:
        raise OutputError(
            f"merge folder {folder}: {step.name} experts are in, but the merge could not be copied from {step} to the "
            f"top of the folder ({error}). Use it there, or from nscmerge continual export."
        ) from error


def tidy(folder: Path, number: int, files: Collection[str]) -> Path:
    """Remove what a step that was cut off left behind, and steps that no longer count; return the one that does.

    Brings a copy that was made with links followed back into shape first.

    Args:
        folder: The growing folder.
        number: Of the step that counts.
        files: Names in it that are to be seen at the top.
    """
    step, link = folder / STEPS / f"{number:04d}", folder / CURRENT
    whole = not link.is_symlink() and link.is_dir()
    for other in _listed(folder / STEPS):
        if whole or other.name != step.name:
            _remove(other)
    if whole:
        step.parent.mkdir(exist_ok=True)
        link.rename(step)
    if not os.path.lexists(link):
        switch(folder, step, files)
    for entry in _listed(folder):
        if (entry.name.startswith(".") and entry.name.endswith(_PARTIAL)) or (
            entry.is_symlink() and not entry.exists() and os.readlink(entry).startswith(f"{CURRENT}/")
        ):
            _remove(entry)
    return step


def _steps(folder: Path) -> list[Path]:
    """Return the directories of steps, complete or not, in order."""
    found = [path for path in _listed(folder / STEPS) if re.fullmatch(r"\d{4,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _partial(place: Path) -> Path:
    """Return a name beside ``place`` that nobody else takes, for what is to replace it."""
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}{_PARTIAL}")


def _replace_by_link(place: Path, target: str, only_try: bool = False) -> bool:
    """Make ``place`` a link to ``target`` in one rename; return False where the disk has no links.

    With ``only_try`` the link is made and removed again.
    """
    fresh = _partial(place)
    try:
        fresh.symlink_to(target)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINKS:
            raise
        return False
    if only_try:
        fresh.unlink()
        return True
    if place.is_dir() and not place.is_symlink():
        _remove(place)
    fresh.replace(place)
    return True


def _replace_by_text(place: Path, text: str) -> None:
    fresh = _partial(place)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(place)


def _replace_by_copy(place: Path, source: Path) -> None:
    fresh = _partial(place)
    if source.is_dir():
        shutil.copytree(source, fresh)
        _remove(place)
    else:
        shutil.copyfile(source, fresh)
    fresh.replace(place)


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Write a folder's list of names to disk; folders cannot be opened on every system."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
