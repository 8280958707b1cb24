"""Stand-ins of the twenty image sets: coloured drawings of four classes each, in the published layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.clip import CLIP_TASKS
from datamodules.twins.pictures import COLOURS, draw, pick, png
from datamodules.twins.vlm import write_note
from nscmerge.errors import ConfigError

NOTE = "stand-in: drawings in one of four colours for four of the classes, not the published data"


def write_clip(folder: str | Path, rows: int = 20, tasks: Sequence[str] | None = None) -> Path:
    """Write image sets, one folder each: parquet with the published columns, folders of images, save_to_disk.

    A colour is a class, so that a tiny model can learn them; only four classes of each set occur.

    Args:
        folder: Where to; made if it is not there.
        rows: Images of the test split; train has twice as many, a tenth of which become our validation.
        tasks: Keys of :data:`datamodules.clip.CLIP_TASKS`; None writes all.

    Returns:
        The folder, with the data of each task in a folder of its key.

    Raises:
        ConfigError: A task is unknown.
    """
    folder = Path(folder)
    for task in tasks if tasks is not None else CLIP_TASKS:
        if task not in CLIP_TASKS:
            raise ConfigError(f"no image data set '{task}'; known: {', '.join(CLIP_TASKS)}.")
        (folder / task).mkdir(parents=True, exist_ok=True)
        scored = CLIP_TASKS[task].scored[0]
        for split, count, start in (("train", 2 * rows, 0), (scored, rows, 1)):
            _write(folder / task, task, split, [_row(task, i, i + start) for i in range(count)])
        write_note(folder / task, NOTE)
    return folder


def _row(task: str, index: int, turn: int) -> tuple[Any, int]:
    """Return a picture and its label; all labels that occur are spread over the classes."""
    classes = CLIP_TASKS[task].classes
    used = sorted({0, classes // 3, 2 * classes // 3, classes - 1})
    label = used[turn % len(used)]
    return draw(pick(COLOURS, turn % len(used)), index=index, grey=index == 1 and task in ("mnist", "kmnist")), label


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
