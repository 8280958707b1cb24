"""Output folders that appear whole or not at all, and the hashes that say what went in."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nscmerge.errors import OutputError, OutputExistsError

#: What a system says of a place that cannot be written, as opposed to a file that cannot be read.
_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EFBIG,
}


def check_absent(path: str | Path) -> Path:
    """Return ``path`` as a :class:`Path` if nothing is there; to be called before any long work.

    Raises:
        OutputExistsError: A file, a link or a folder (even an empty one) is there already.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise OutputExistsError(f"{path} is there already and nothing is overwritten. Name a new folder, or move it.")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` when the block ends without an error.

    Every file is flushed to disk before the rename, so that after a crash ``path`` is either absent or complete. After
    an error the temporary folder is removed; a killed process may leave it, with a leading dot and ``.partial`` in its
    name.

    Args:
        path: Folder to make; missing parents are made too.

    Raises:
        OutputExistsError: ``path`` is there already, checked before the block runs and again before the rename.
        OutputError: The disk is full, or may not be written.
    """
    path = check_absent(path).absolute()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for entry in sorted(partial.rglob("*")):
            _flush(entry)
        _flush(partial)
        # A rename would silently replace an empty folder that somebody made in the meantime.
        check_absent(path)
        partial.rename(path)
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if unwritable(error):
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{path} cannot be written ({reason}); nothing of it was kept. Free some space, or name an output on a "
                "disk that can be written."
            ) from error
        raise


def unwritable(error: BaseException) -> bool:
    """Return True if ``error`` says that a disk is full, or may not be written."""
    if isinstance(error, SafetensorError):
        # The library has no error numbers, only Rust's words for them.
        return "os error 28" in str(error) or "StorageFull" in str(error)
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


def _flush(path: Path) -> None:
    """Write ``path`` (a file or a folder's list of names) to disk; folders cannot be opened on every system."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
