"""Stand-ins of the four tasks of MM-MergeBench: drawings, and instruction files in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.llava4 import NAMES
from datamodules.llava4_records import CAPTIONS, TASKS, TRAIN
from datamodules.twins.pictures import COLOURS, SHAPES, draw, pick, turns
from datamodules.twins.vlm import NOTE, describe, write_note
from datamodules.vlm_prompts import letter


def write_llava4(folder: str | Path, rows: int = 20, train_rows: int | None = None, seed: int = 0) -> dict[str, Path]:
    """Write the four tasks, each in a folder of its key: ``train.json``, the evaluation file, the pictures.

    Args:
        folder: Where to.
        rows: Records of the evaluation files.
        train_rows: Records for training, a tenth of which become our validation; None takes twice ``rows``.
        seed: Of the order of what is drawn.

    Returns:
        ``{task: the folder for the data module's source}``.
    """
    root = Path(folder)
    for task, known in TASKS.items():
        own = root / task
        (own / "images").mkdir(parents=True, exist_ok=True)
        for split, file, size in (("train", TRAIN, train_rows or 2 * rows), ("test", known.test, rows)):
            contents = [(pick(COLOURS, t), pick(SHAPES, t // 2)) for t in turns(size, "llava4", split, seed)]
            _write(own / file, [_record(own, task, split, i, *content) for i, content in enumerate(contents)])
            if task == "vizwiz_caption" and split == "test":
                _write(own / CAPTIONS, _references(contents))
        write_note(own, NOTE)
    return {task: root / task for task in TASKS}


def _record(folder: Path, task: str, split: str, index: int, colour: str, shape: str) -> dict[str, Any]:
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


def _references(contents: list[tuple[str, str]]) -> dict[str, Any]:
    """Captions in the layout of COCO, pictures counted from 1."""
    captions = [(i, text) for i, content in enumerate(contents, 1) for text in describe(*content)]
    return {
        "images": [{"id": i, "file_name": f"test_{i - 1}.png"} for i in range(1, len(contents) + 1)],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions)],
    }


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1), "utf-8")
