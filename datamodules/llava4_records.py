"""Instruction files of MM-MergeBench (RobustMerge, arXiv:2502.17159): JSON lists of pictures, questions and answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.images import ImageMode
from datamodules.vlm_prompts import IMAGE, letter
from nscmerge.errors import DataError, DatasetNotFoundError


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        folder: Its folder among the published instructions.
        test: The file that its scores are computed on.
        image_mode: What its evaluation does to a picture.
    """

    folder: str
    test: str
    image_mode: ImageMode


TASKS: dict[str, Task] = {
    "iconqa": Task("IconQA", "val.json", "pad"),
    "imagenet": Task("ImageNet", "test.json", "center_crop"),
    "scienceqa": Task("ScienceQA", "test.json", "center_crop"),
    "vizwiz_caption": Task("VizWiz-caption", "val.json", "pad"),
}
TRAIN = "train.json"
#: References of the captions that are scored.
CAPTIONS = "val_coco_type.json"


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        name: What messages call it.
        text: What the user says.
        image: Path of the picture as the file has it; None for a question without one.
        answers: All that is accepted.
    """

    name: str
    text: str
    image: str | None
    answers: list[str]


def instruction_file(source: Path, task: str, split: str) -> Path:
    """Return the file of the ``train`` or ``test`` records, from the task's folder or from that of all instructions.

    Raises:
        DatasetNotFoundError: It is in neither.
    """
    known = TASKS[task]
    name = known.test if split == "test" else TRAIN
    for folder in (source, source / known.folder):
        if (folder / name).is_file():
            return folder / name
    raise DatasetNotFoundError(
        f"{task}: {source} has neither {name} nor {known.folder}/{name}, which the '{split}' records are read from. "
        "Set `source` to the folder of the instructions (AuroraZengfh/MM-MergeBench on the hub)."
    )


def read_records(file: Path, task: str) -> list[Record]:
    """Return the samples of an instruction file, in its order.

    Each has ``image``, ``text`` and ``answer``, or the turns of LLaVA's training files under ``conversations``.

    Raises:
        DatasetNotFoundError: The file with the references of the captions is missing.
        DataError: A file is no JSON, or a record lacks something.
    """
    rows = _load(file)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file}: expected a JSON list of records, at least one.")
    references = None
    if task == "vizwiz_caption" and file.name == TASKS[task].test:
        references = _references(file.parent / CAPTIONS)
    return [_record(row, i, file, task, references) for i, row in enumerate(rows)]


def _record(row: Any, index: int, file: Path, task: str, references: Mapping[int, list[str]] | None) -> Record:
    where = f"{file}, record {index}"
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}.")
    where += f" ({row['question_id']})" if "question_id" in row else ""
    text, answer = row.get("text"), row.get("answer")
    if (turns := row.get("conversations")) is not None:
        text, answer = _turns(turns, where)
    if references is not None:
        answer = references.get(index + 1)  # the evaluation counts pictures from 1, in the order of the records
        if not answer:
            raise DataError(f"{where}: {CAPTIONS} has no caption for the picture {index + 1}.")
    if not isinstance(text, str):
        raise DataError(f"{where}: its text is {text!r}; expected what the user says.")
    if task == "scienceqa" and isinstance(answer, int):
        answer = letter(answer)
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(one, str) for one in answers):
        raise DataError(f"{where}: its answer is {answer!r}; expected a text or a list of texts.")
    return Record(where, text.replace(IMAGE, "").strip(), row.get("image"), answers)


def _turns(turns: Any, where: str) -> tuple[str, str]:
    """Return what the first user and the first assistant say; pairs after them would need a chat of several turns."""
    try:
        (first, second) = turns
        if (first["from"], second["from"]) == ("human", "gpt"):
            return first["value"], second["value"]
    except (TypeError, ValueError, KeyError):
        pass
    raise DataError(f"{where}: its conversation is not one turn of a human and one of gpt.")


def _references(file: Path) -> dict[int, list[str]]:
    if not file.is_file():
        raise DatasetNotFoundError(
            f"vizwiz_caption: {file} is missing; it has the references that captions are scored by."
        )
    captions: defaultdict[int, list[str]] = defaultdict(list)
    try:
        for annotation in _load(file)["annotations"]:
            captions[int(annotation["image_id"])].append(annotation["caption"])
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{file}: expected COCO captions, annotations with image_id and caption; {error!r}.") from error
    return dict(captions)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is no JSON ({error}). Fetch it again.") from error
