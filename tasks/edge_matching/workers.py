"""Counting many images: in this process or in a pool, with finished images kept in a folder."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nscmerge.errors import ConfigError, NSCMergeError, OutputError
from tasks.edge_matching.counting import Counts, count_image
from tasks.edge_matching.protocol import Protocol

#: 8-bit edge map and boundary map of one image, both (H, W).
Image = tuple[NDArray[np.uint8], NDArray[np.bool_]]
#: Raised when counts change meaning, so that old files in a folder are not read.
_VERSION = 1


class EdgeCounter:
    """Counts images; the same numbers for any number of workers.

    Args:
        protocol: What is counted.
        workers: Processes beside this one; 0 counts in this one. They are started with the first images and live until
            :meth:`close`.
        cache: Folder for the counts of finished images, one small file each, named by the hash of what went in, so that
            a run that was cut off goes on where it was; None keeps nothing.

    Raises:
        ConfigError: ``workers`` is negative.
    """

    def __init__(self, protocol: Protocol, workers: int = 0, cache: str | Path | None = None) -> None:
        if workers < 0:
            raise ConfigError(f"workers is {workers}; expected 0 (this process) or more.")
        self.protocol, self.workers = protocol, workers
        self.cache = None if cache is None else Path(cache)
        self._pool: ProcessPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pool out of copies."""
        return {**self.__dict__, "_pool": None}

    def count(self, images: Sequence[Image]) -> Iterator[Counts]:
        """Yield the counts of every image, int64 (T, 3), in order.

        Raises:
            ShapeError: Edge map and boundary of an image differ in size.
            NSCMergeError: A worker died.
            OutputError: The folder cannot be written.
        """
        known = [self._read(image) for image in images]
        missing = [image for image, counts in zip(images, known, strict=True) if counts is None]
        counted = self._run(missing)
        for image, counts in zip(images, known, strict=True):
            if counts is None:
                counts = next(counted)
                self._write(image, counts)
            yield counts

    def close(self) -> None:
        """End the workers, if there are any; counting again starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _run(self, images: Sequence[Image]) -> Iterator[Counts]:
        if not self.workers or not images:
            yield from (count_image(*image, self.protocol) for image in images)
            return
        if self._pool is None:
            # Spawned, as a fork would copy the threads' locks of whatever trains here.
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        levels, boundaries = zip(*images, strict=True)
        try:
            yield from self._pool.map(count_image, levels, boundaries, [self.protocol] * len(images))
        except BrokenProcessPool as error:
            self._pool = None
            raise NSCMergeError(
                f"a process that counts edges died (of {self.workers}), most likely for want of memory. Use fewer "
                "workers, or 0 to count in the main process."
            ) from error

    def _file(self, image: Image) -> Path | None:
        if self.cache is None:
            return None
        levels, boundary = image
        content = hashlib.sha256(repr((_VERSION, self.protocol, levels.shape)).encode())
        content.update(np.ascontiguousarray(levels))
        content.update(np.packbits(boundary))
        return self.cache / f"{content.hexdigest()}.npy"

    def _read(self, image: Image) -> Counts | None:
        """Return the counts kept for an image; None if there are none or the file is damaged."""
        if (file := self._file(image)) is None or not file.is_file():
            return None
        try:
            counts = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        expected = (len(self.protocol.thresholds), 3)
        return counts if counts.shape == expected and counts.dtype == np.int64 else None

    def _write(self, image: Image, counts: Counts) -> None:
        if (file := self._file(image)) is None:
            return
        partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as stream:
                np.save(stream, counts, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise OutputError(
                f"{self.cache} cannot keep edge counts ({error.strerror}). Free some space, or name another folder."
            ) from error
