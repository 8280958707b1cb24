"""Stand-ins of the six vision-language data sets: drawings and questions about them, in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datamodules.sources.local import STAND_IN
from datamodules.twins.pictures import COLOURS, SHAPES, draw, pick, png

NOTE = "stand-in: drawings of coloured shapes and questions about them, not the published data"
Row = dict[str, Any]


def write_vlm(folder: str | Path, rows: int = 20) -> Path:
    """Write the six data sets, one folder each: parquet, jsonl with image files, and what save_to_disk writes.

    Every answer can be seen in the drawing. One picture of each split has a single channel, none is a square.

    Args:
        folder: Where to; made if it is not there.
        rows: Pictures per published split. A fifth of the validation pictures of VizWiz, IconQA and DocVQA become our
            validation, so 20 give 4.

    Returns:
        The folder, with the data of each task in a folder of its key.
    """
    folder = Path(folder)
    _parquet(folder / "vizwiz", {s: _vizwiz(s, rows) for s in ("train", "validation")})
    _saved(folder / "iconqa", {s: _iconqa(s, rows) for s in ("train", "val")})
    _parquet(folder / "chartqa", {s: _chartqa(s, rows) for s in ("train", "val", "test")})
    _jsonl(folder / "docvqa", {s: _docvqa(s, rows) for s in ("train", "validation")})
    _parquet(folder / "coco", {s: _coco(s, rows) for s in ("train", "validation", "test")})
    _saved(folder / "flickr30k", {"test": [row for s in ("train", "val", "test") for row in _flickr(s, rows)]})
    return folder


def write_note(folder: Path, note: str) -> None:
    """Write the file by which data say that they stand in for others."""
    (folder / STAND_IN).write_text(note + "\n", "utf-8")


def _pictures(split: str, rows: int, number: Callable[[int], int] = lambda i: 1) -> Iterator[tuple[int, str, str, Any]]:
    """Yield (number, colour, shape, picture); splits begin at different places, so that they differ."""
    start = {"train": 0, "validation": 1, "val": 1, "test": 2}[split]
    for i in range(rows):
        colour, shape = pick(COLOURS, i + start), pick(SHAPES, i // 2 + start)
        yield i, colour, shape, draw(colour, shape, number(i), i + start, grey=i == rows - 1)


def _vizwiz(split: str, rows: int) -> Iterator[Row]:
    for i, colour, shape, image in _pictures(split, rows):
        question, answer = [("what color is this?", colour), ("what shape is this?", shape)][i % 2]
        # ten annotators, not all of one mind; the first is the one that training learns
        answers = [answer] * 7 + ["unanswerable"] * 2 + [f"a {answer}"]
        yield {"image": png(image), "question": question, "answers": answers, "filename": f"VizWiz_{split}_{i:08d}.png"}


def _iconqa(split: str, rows: int) -> Iterator[Row]:
    for _, colour, _, image in _pictures(split, rows):
        yield {"image": png(image), "question": "What color is the ground?", "answer": colour}


def _chartqa(split: str, rows: int) -> Iterator[Row]:
    for i, colour, _, image in _pictures(split, rows, lambda i: i % 4 + 1):
        query, label = [("How many bars are there?", str(i % 4 + 1)), ("What is the color?", colour)][i % 2]
        yield {"image": png(image), "query": query, "label": [label], "human_or_machine": i % 2}


def _docvqa(split: str, rows: int) -> Iterator[Row]:
    for i, colour, _, image in _pictures(split, rows):
        answers = [colour, colour.capitalize()]
        yield {"image": png(image), "question": "What is the color of the page?", "answers": answers, "question_id": i}


def _coco(split: str, rows: int) -> Iterator[Row]:
    for i, colour, shape, image in _pictures(split, rows):
        for n, text in enumerate(describe(colour, shape)):
            sentence = {"raw": text, "tokens": text.split(), "imgid": i, "sentid": 5 * i + n}
            yield {"image": png(image), "imgid": i, "cocoid": 1000 + i, "sentences": sentence}


def _flickr(split: str, rows: int) -> Iterator[Row]:
    for i, colour, shape, image in _pictures(split, rows):
        name = f"{split}{i}"
        texts = describe(colour, shape)
        ids = {"sentids": [str(n) for n in range(len(texts))], "img_id": name, "filename": f"{name}.png"}
        yield {"image": png(image), "caption": texts, "split": split, **ids}


def describe(colour: str, shape: str) -> list[str]:
    """Return five captions of a drawing; the last has blanks around it, which readers strip."""
    return [
        f"A white {shape} on {colour}.",
        f"a {shape} on a {colour} ground",
        f"One white {shape} in front of {colour}.",
        f"A {colour} picture with a white {shape}.",
        f" The {shape} is white, the ground is {colour}. ",
    ]


def _dataset(rows: Iterator[Row] | list[Row]) -> Any:
    from datasets import Dataset, Image

    data = Dataset.from_list([{**row, "image": {"bytes": row["image"], "path": None}} for row in rows])
    return data.cast_column("image", Image())


def _parquet(folder: Path, splits: dict[str, Iterator[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        _dataset(rows).to_parquet(str(folder / f"{split}.parquet"))
    write_note(folder, NOTE)


def _saved(folder: Path, splits: dict[str, Any]) -> None:
    from datasets import DatasetDict

    DatasetDict({split: _dataset(rows) for split, rows in splits.items()}).save_to_disk(str(folder))
    write_note(folder, NOTE)


def _jsonl(folder: Path, splits: dict[str, Iterator[Row]]) -> None:
    """Lines of JSON beside image files, with paths relative to the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = []
        for i, row in enumerate(rows):
            path = f"images/{split}_{i}.png"
            (folder / path).write_bytes(row["image"])
            lines.append(json.dumps({**row, "image": path}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    write_note(folder, NOTE)
