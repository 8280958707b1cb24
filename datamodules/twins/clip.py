"""Stand-ins of the twenty image sets: coloured drawings of four classes each, in the published layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.clip import CLIP_TASKS
from datamodules.twins.pictures import COLOURS, draw, pick, png, turns
from datamodules.twins.vlm import write_note
from nscmerge.errors import ConfigError

NOTE = "stand-in: drawings in one of four colours for four of the classes, not the published data"


def write_clip(
    folder: str | Path,
    rows: int = 20,
    train_rows: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Write image sets, each in a folder of its key: parquet with the published columns, image folders, save_to_disk.

    A colour is a class, so that a tiny model can learn them; only four classes of each set occur.

    Args:
        folder: Where to.
        rows: Images of the test split.
        train_rows: Images for training, a tenth of which become our validation; None takes twice ``rows``.
        seed: Of the order of what is drawn.
        tasks: Keys of :data:`datamodules.clip.CLIP_TASKS`; None writes all.

    Returns:
        ``{task: the folder for the data module's source}``.

    Raises:
        ConfigError: A task is unknown.
    """
    root, chosen = Path(folder), list(CLIP_TASKS) if tasks is None else list(tasks)
    if unknown := [task for task in chosen if task not in CLIP_TASKS]:
        raise ConfigError(f"no image data set {', '.join(map(repr, unknown))}; known: {', '.join(CLIP_TASKS)}.")
    for task in chosen:
        (root / task).mkdir(parents=True, exist_ok=True)
        for split, size in (("train", train_rows or 2 * rows), (CLIP_TASKS[task].scored[0], rows)):
            order = turns(size, "clip", split, seed)
            _write(root / task, task, split, [_row(task, i, turn) for i, turn in enumerate(order)])
        write_note(root / task, NOTE)
    return {task: root / task for task in chosen}


def _row(task: str, index: int, turn: int) -> tuple[Any, int]:
    """Return a picture and its label; all labels that occur are spread over the classes."""
    classes = CLIP_TASKS[task].classes
    used = sorted({0, classes // 3, 2 * classes // 3, classes - 1})
    kind = turn % len(used)
    return draw(pick(COLOURS, kind), index=index, grey=index == 1 and task in ("mnist", "kmnist")), used[kind]


def _write(folder: Path, task: str, split: str, rows: list[tuple[Any, int]]) -> None:
    if task == "mnist":  # a folder per class, numbered
        for i, (image, label) in enumerate(rows):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / str(label) / f"{i}.png")
        return
    data = _dataset(task, rows)
    if task == "dtd":
        data.save_to_disk(str(folder / split))
    else:
        data.to_parquet(str(folder / f"{split}.parquet"))


def _dataset(task: str, rows: list[tuple[Any, int]]) -> Any:
    from datasets import ClassLabel, Dataset, Image

    pictures = [{"bytes": png(image), "path": None} for image, _ in rows]
    labels = [label for _, label in rows]
    if task == "fer2013":  # the columns of webdataset
        keys = [f"{i:05d}" for i in range(len(rows))]
        columns = {"jpg": pictures, "cls": labels, "__key__": keys, "__url__": ["fer2013-0.tar"] * len(rows)}
        return Dataset.from_dict(columns).cast_column("jpg", Image())
    if task == "cifar100":
        columns = {"img": pictures, "fine_label": labels, "coarse_label": [label // 5 for label in labels]}
        return Dataset.from_dict(columns).cast_column("img", Image())
    if task == "pcam":
        return Dataset.from_dict({"image": pictures, "label": [bool(label) for label in labels]}).cast_column(
            "image", Image()
        )
    data = Dataset.from_dict({"image": pictures, "label": labels}).cast_column("image", Image())
    if task == "eurosat":  # numbered names, of which only the numbers count
        names = [f"land {i}" for i in range(CLIP_TASKS[task].classes)]
        data = data.cast_column("label", ClassLabel(names=names))
    return data
