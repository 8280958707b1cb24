"""Stand-ins of the six vision-language data sets: drawings and questions about them, in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.sources.local import STAND_IN
from datamodules.twins.pictures import COLOURS, SHAPES, draw, pick, png, turns

NOTE = "stand-in: drawings of coloured shapes and questions about them, not the published data"
Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """What one picture shows: its number in its split, colour of the ground, shape on it, how many bars a chart has."""

    number: int
    colour: str
    shape: str
    bars: int

    def png(self, shapes: int = 1) -> bytes:
        """Return it as a file; the first of a split has a single channel."""
        return png(draw(self.colour, self.shape, shapes, self.number, grey=self.number == 0))


Make = Callable[[str, Iterator[Drawing]], Iterator[Row]]


def write_vlm(folder: str | Path, rows: int = 20, train_rows: int | None = None, seed: int = 0) -> dict[str, Path]:
    """Write the six data sets, each in a folder of its key: parquet, jsonl with image files, what save_to_disk writes.

    Every answer can be seen in the drawing. The first picture of each split has a single channel, none is a square.

    Args:
        folder: Where to.
        rows: Pictures of every published split, 10 or more; of the validation pictures of VizWiz, IconQA and DocVQA a
            fifth become our validation, so 20 give 4.
        train_rows: Pictures of the training splits; None takes ``rows``.
        seed: Of the order of what is drawn.

    Returns:
        ``{task: the folder for the data module's source}``.
    """
    root = Path(folder)
    size = {"train": train_rows or rows}

    def splits(make: Make, *names: str) -> dict[str, list[Row]]:
        return {name: list(make(name, _pictures(name, size.get(name, rows), seed))) for name in names}

    _parquet(root / "vizwiz", splits(_vizwiz, "train", "validation"))
    _saved(root / "iconqa", splits(_iconqa, "train", "val"))
    _parquet(root / "chartqa", splits(_chartqa, "train", "val", "test"))
    _jsonl(root / "docvqa", splits(_docvqa, "train", "validation"))
    _parquet(root / "coco", splits(_coco, "train", "validation", "test"))
    flickr = splits(_flickr, "train", "val", "test")
    _saved(root / "flickr30k", {"test": [row for rows in flickr.values() for row in rows]})
    return {task: root / task for task in ("vizwiz", "iconqa", "chartqa", "docvqa", "coco", "flickr30k")}


def write_note(folder: Path, note: str) -> None:
    """Write the file by which data say that they stand in for others."""
    (folder / STAND_IN).write_text(note + "\n", "utf-8")


def _pictures(split: str, rows: int, seed: int) -> Iterator[Drawing]:
    for i, turn in enumerate(turns(rows, "vlm", split, seed)):
        yield Drawing(i, pick(COLOURS, turn), pick(SHAPES, turn // 2), i % 4 + 1)


def _vizwiz(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        question, answer = [("what color is this?", it.colour), ("what shape is this?", it.shape)][it.number % 2]
        # ten annotators, not all of one mind; the first is the one that training learns
        answers = [answer] * 7 + ["unanswerable"] * 2 + [f"a {answer}"]
        yield {
            "image": it.png(),
            "question": question,
            "answers": answers,
            "filename": f"VizWiz_{split}_{it.number:08d}.png",
        }


def _iconqa(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        yield {"image": it.png(), "question": "What color is the ground?", "answer": it.colour}


def _chartqa(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        query, label = [("How many bars are there?", str(it.bars)), ("What is the color?", it.colour)][it.number % 2]
        yield {"image": it.png(it.bars), "query": query, "label": [label], "human_or_machine": it.number % 2}


def _docvqa(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        answers = [it.colour, it.colour.capitalize()]
        yield {
            "image": it.png(),
            "question": "What is the color of the page?",
            "answers": answers,
            "question_id": it.number,
        }


def _coco(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        for n, text in enumerate(describe(it.colour, it.shape)):
            sentence = {"raw": text, "tokens": text.split(), "imgid": it.number, "sentid": 5 * it.number + n}
            yield {"image": it.png(), "imgid": it.number, "cocoid": 1000 + it.number, "sentences": sentence}


def _flickr(split: str, drawn: Iterator[Drawing]) -> Iterator[Row]:
    for it in drawn:
        name = f"{split}{it.number}"
        texts = describe(it.colour, it.shape)
        ids = {"sentids": [str(n) for n in range(len(texts))], "img_id": name, "filename": f"{name}.png"}
        yield {"image": it.png(), "caption": texts, "split": split, **ids}


def describe(colour: str, shape: str) -> list[str]:
    """Return five captions of a drawing; the last has blanks around it, which readers strip."""
    return [
        f"A white {shape} on {colour}.",
        f"a {shape} on a {colour} ground",
        f"One white {shape} in front of {colour}.",
        f"A {colour} picture with a white {shape}.",
        f" The {shape} is white, the ground is {colour}. ",
    ]


def _dataset(rows: list[Row]) -> Any:
    from datasets import Dataset, Image

    data = Dataset.from_list([{**row, "image": {"bytes": row["image"], "path": None}} for row in rows])
    return data.cast_column("image", Image())


def _parquet(folder: Path, splits: dict[str, list[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        _dataset(rows).to_parquet(str(folder / f"{split}.parquet"))
    write_note(folder, NOTE)


def _saved(folder: Path, splits: dict[str, list[Row]]) -> None:
    from datasets import DatasetDict

    DatasetDict({split: _dataset(rows) for split, rows in splits.items()}).save_to_disk(str(folder))
    write_note(folder, NOTE)


def _jsonl(folder: Path, splits: dict[str, list[Row]]) -> None:
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
