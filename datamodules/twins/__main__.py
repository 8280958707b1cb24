"""Write the offline stand-in of a suite: ``python -m datamodules.twins nli6 --output runs/twins/nli6``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from datamodules.clip import CLIP_TASKS
from datamodules.twins.models import write_clip, write_llama, write_llava, write_t5
from nscmerge.errors import NSCMergeError, OutputExistsError

Suite = Literal["nli6", "vlm6", "clip8", "clip14", "clip20", "glue8", "llava4"]
#: What writes a suite's base model, and the module and function that write its data.
WRITERS: dict[str, tuple[Callable[..., Path], str, str]] = {
    "nli6": (write_llama, "nli", "write_nli"),
    "vlm6": (write_llava, "vlm", "write_vlm"),
    "clip": (write_clip, "clip", "write_clip"),
    "glue8": (write_t5, "glue", "write_glue"),
    "llava4": (write_llava, "llava4", "write_llava4"),
}


def write_twin(suite: Suite, output: Path, rows: int = 20, train_rows: int = 60, seed: int = 0) -> list[str]:
    """Write ``base/``, a tiny random model with its tokenizer or processor, and ``data/TASK/`` for every task.

    Args:
        suite: Which suite of configs/experiments.
        output: Folder to write; must not exist.
        rows: Rows of every split, 10 or more.
        train_rows: Rows of the training splits.
        seed: Of weights and rows.

    Returns:
        The names of the tasks.

    Raises:
        OutputExistsError: ``output`` is there already.
    """
    if output.exists():
        raise OutputExistsError(f"{output} is there already and nothing is overwritten. Name a new folder, or move it.")
    base, home, name = WRITERS["clip" if suite.startswith("clip") else suite]
    base(output / "base", seed=seed)
    module = import_module(f"datamodules.twins.{home}")
    # The suites of CLIP differ in how many of its sets they have.
    more = {"tasks": list(CLIP_TASKS)[: int(suite.removeprefix("clip"))]} if home == "clip" else {}
    return list(getattr(module, name)(output / "data", rows=rows, train_rows=train_rows, seed=seed, **more))


def main(args: Sequence[str] | None = None) -> None:
    """Run :func:`write_twin` from a command line."""
    import datasets
    from transformers.utils import logging

    parser = ArgumentParser(prog="python -m datamodules.twins", description=str(write_twin.__doc__).partition("\n")[0])
    parser.add_argument("suite", type=Suite, help="suite of configs/experiments")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--rows", type=int, default=20, help="rows of every split, 10 or more")
    parser.add_argument("--train-rows", type=int, default=60, help="rows of the training splits")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows")
    options = parser.parse_args(args).as_dict()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        tasks = write_twin(**options)
    except NSCMergeError as error:
        raise SystemExit(f"datamodules.twins: {error}") from None
    print(f"stand-in of {options['suite']} written to {options['output']}: a random base and {', '.join(tasks)}")


if __name__ == "__main__":
    main(sys.argv[1:])
