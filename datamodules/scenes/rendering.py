"""Rendering a tree once: into a temporary folder beside its place, by a pool of workers, then renamed as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from rich.progress import track

#: Fewer units than this are rendered in this process: starting workers takes longer.
WORTH_A_POOL = 8


class Tree(Protocol):
    """A data set that can be written piece by piece; must be picklable."""

    @property
    def name(self) -> str:
        """Folder name: data set, seed, counts and image size."""

    @property
    def units(self) -> int:
        """Number of pieces that are independent of each other."""

    def write(self, root: Path, unit: int) -> None:
        """Write the files of one piece."""

    def finish(self, root: Path) -> None:
        """Write what needs all pieces: lists of splits."""


def render(tree: Tree, folder: Path, workers: int | None = None) -> Path:
    """Return ``folder``, where ``tree`` is written unless it is there already; all of it or nothing.

    Several processes may ask for the same folder at once: the first that is done fills it, the others' work is dropped.

    Args:
        tree: What to write.
        folder: Where.
        workers: Processes; None takes one per CPU. The files do not depend on it. They are spawned, so a
            script of your own needs the usual ``if __name__ == "__main__":``.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        root = Path(temporary) / "tree"
        root.mkdir()
        processes = min(workers or os.cpu_count() or 1, tree.units)
        for _ in track(
            _written(tree, root, processes), total=tree.units, description=f"rendering {tree.name}", transient=True
        ):
            pass
        tree.finish(root)
        try:
            root.rename(folder)
        except OSError:
            # Another process was faster, with the same files.
            if not folder.is_dir():
                raise
    return folder


def _written(tree: Tree, root: Path, processes: int) -> Iterator[int]:
    """Yield the number of each piece when it is written."""
    if processes == 1 or tree.units < WORTH_A_POOL:
        for unit in range(tree.units):
            tree.write(root, unit)
            yield unit
        return
    # Spawned, not forked: the caller may hold threads, of torch or of a loader. One thread each: no fight for CPUs.
    with (
        _one_thread(),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        futures = {pool.submit(tree.write, root, unit): unit for unit in range(tree.units)}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start meanwhile use one thread for linear algebra, unless the environment says otherwise."""
    missing = [name for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
