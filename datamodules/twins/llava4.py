"""Stand-ins of the four tasks of MM-MergeBench: drawings, and instruction files in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.llava4 import NAMES
from datamodules.llava4_records import CAPTIONS, TASKS, TRAIN
from datamodules.twins.pictures import COLOURS, SHAPES, draw, pick
from datamodules.twins.vlm import NOTE, describe, write_note
from datamodules.vlm_prompts import letter


def write_llava4(folder: str | Path, rows: int = 20) -> Path:
    """Write the four tasks, one folder each: ``train.json``, the evaluation file, the pictures.

    Args:
        folder: Where to; made if it is not there.
        rows: Records of an evaluation file; training has twice as many, a tenth of which become our validation.

    Returns:
        The folder, with the data of each task in a folder of its key.
    """
    folder = Path(folder)
    for task, known in TASKS.items():
        own = folder / task
        (own / "images").mkdir(parents=True, exist_ok=True)
        _write(own / TRAIN, [_record(own, task, i, "train") for i in range(2 * rows)])
        _write(own / known.test, [_record(own, task, i, "test") for i in range(rows)])
        if task == "vizwiz_caption":
            _write(own / CAPTIONS, _references(rows))
        write_note(own, NOTE)
    return folder


def _record(folder: Path, task: str, index: int, split: str) -> dict[str, Any]:
    colour, shape = _content(index, split)
    path = f"images/{split}_{index}.png"
    draw(colour, shape, 1, index, grey=split == "test" and index == 1).save(folder / path)
    text, answer = _asked(task, colour, shape)
    record = {"question_id": f"{split}_{index}", "image": path, "text": text, "answer": answer}
    if split == "train" and index % 2:  # LLaVA's own training files are turns of a conversation
        turns = [
            {"from": "human", "value": "<image>\n" + record.pop("text")},
            {"from": "gpt", "value": record.pop("answer")},
        ]
        record["conversations"] = turns
    return record


def _content(index: int, split: str) -> tuple[str, str]:
    start = 2 if split == "test" else 0
    return pick(COLOURS, index + start), pick(SHAPES, index // 2 + start)


def _asked(task: str, colour: str, shape: str) -> tuple[str, str]:
    if task == "imagenet":
        # one of the hundred names for each colour
        names = NAMES.read_text("utf-8").splitlines()
        return "What is the object in the image?", names[list(COLOURS).index(colour)]
    if task == "scienceqa":
        choices = "\n".join(f"{letter(i)}. {name}" for i, name in enumerate(COLOURS))
        return f"Which color is the ground?\n{choices}", letter(list(COLOURS).index(colour))
    if task == "vizwiz_caption":
        return "Provide a one-sentence caption for the provided image.", describe(colour, shape)[0]
    return "What color is the ground? Answer with a word.", colour


def _references(rows: int) -> dict[str, Any]:
    """Captions in the layout of COCO, pictures counted from 1."""
    captions = [(i + 1, text) for i in range(rows) for text in describe(*_content(i, "test"))]
    return {
        "images": [{"id": i + 1, "file_name": f"test_{i}.png"} for i in range(rows)],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions)],
    }


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1), "utf-8")
