"""The six vision-language data sets as published: where they lie, their columns and splits, how a row is asked.

Validation, on which merges are learned, and test are cut from the official splits as NSC's code does (20 and 80 percent
of a validation split, seed 42), because the official test splits have no answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.base import Split
from datamodules.sources import DatasetSpec, Part, Place, Table, TrainTestSplit
from datamodules.vlm_prompts import CAPTIONING, Style, letter, user_text
from nscmerge.errors import DataError

VALIDATION = ("validation", "val")
#: "train" of the cut is our validation, "test" our test split.
_CUT = TrainTestSplit(test_size=0.8, seed=42)
_CUT_SPLITS: dict[Split, Part] = {
    "train": Part("train"),
    "val": Part(VALIDATION, cut=_CUT),
    "test": Part(VALIDATION, cut=_CUT, side=1),
}
_OWN_SPLITS: dict[Split, Part] = {"train": Part("train"), "val": Part(VALIDATION), "test": Part("test")}

SPECS: dict[str, DatasetSpec] = {
    "vizwiz": DatasetSpec(
        "VizWiz-VQA",
        # the loading script of the first is no longer run, its parquet export is
        [
            Place("HuggingFaceM4/VizWiz"),
            Place("HuggingFaceM4/VizWiz", revision="refs/convert/parquet"),
            Place("lmms-lab/VizWiz-VQA"),
        ],
        {"image": "image", "question": "question", "answers": "answers", "id": ("filename", "question_id")},
        _CUT_SPLITS,
        optional=frozenset({"id"}),
    ),
    "iconqa": DatasetSpec(
        "IconQA",
        [Place("lmms-lab/ICON-QA")],  # the sets of the official code are not published; this copy has no train split
        {
            "image": ("image", "query_image"),
            "question": "question",
            "answer": ("answer", "answers"),
            "choices": "choices",
            "kind": "ques_type",
            "id": ("question_id", "id"),
        },
        _CUT_SPLITS,
        optional=frozenset({"choices", "kind", "id"}),
    ),
    "chartqa": DatasetSpec(
        "ChartQA",
        [Place("HuggingFaceM4/ChartQA"), Place("lmms-lab/ChartQA")],
        {"image": "image", "question": ("query", "question"), "answers": ("label", "answer")},
        _OWN_SPLITS,
    ),
    "docvqa": DatasetSpec(
        "DocVQA",
        [Place("pixparse/docvqa-single-page-questions"), Place("lmms-lab/DocVQA", config="DocVQA")],
        {"image": "image", "question": "question", "answers": "answers", "id": ("question_id", "questionId")},
        _CUT_SPLITS,
        optional=frozenset({"id"}),
    ),
    "coco": DatasetSpec(
        "COCO captions",
        [
            Place("HuggingFaceM4/COCO"),
            Place("HuggingFaceM4/COCO", revision="refs/convert/parquet"),
            Place("yerevann/coco-karpathy"),
        ],
        {"image": "image", "captions": "sentences", "id": ("imgid", "cocoid")},
        _OWN_SPLITS,
    ),
    "flickr30k": DatasetSpec(
        "Flickr30k",
        [
            Place("nlphuji/flickr30k"),
            Place("nlphuji/flickr30k", revision="refs/convert/parquet"),
            Place("umaru97/flickr30k_train_val_test"),
        ],
        {"image": "image", "captions": "caption", "id": ("img_id", "filename"), "split": "split"},
        # all of it is published as one split "test"; a column says which row belongs where
        {
            "train": Part(("train", "test"), where=("split", "train")),
            "val": Part((*VALIDATION, "test"), where=("split", "val")),
            "test": Part("test", where=("split", "test")),
        },
    ),
}


def groups(task: str, table: Table) -> list[list[int]]:
    """Return the row numbers of each sample: captions that are one row each are joined by picture, in order."""
    if task not in CAPTIONING:
        return [[i] for i in range(len(table))]
    by_image: dict[Any, list[int]] = {}
    for i, image in enumerate(table.column("id")):
        by_image.setdefault(image, []).append(i)
    return list(by_image.values())


def one_picture(table: Table) -> list[int]:
    """Return the rows of IconQA that ask of one picture: those that choose among pictures have several."""
    if "kind" not in table:
        return list(range(len(table)))
    return [i for i, kind in enumerate(table.column("kind")) if kind != "choose_img"]


def question_of(task: str, row: Mapping[str, Any], style: Style, where: str) -> str:
    """Return what the user says of a sample; reads no answer.

    Args:
        task: Key of :data:`SPECS`.
        row: Its first row.
        style: Whose words.
        where: Data set and sample, for messages.

    Raises:
        DataError: It has no question.
    """
    if task in CAPTIONING:
        return user_text(task, style)
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: its question is {question!r}; expected a text.")
    return user_text(task, style, question, read_choices(row) if task == "iconqa" else None)


def answers_of(task: str, rows: Sequence[Mapping[str, Any]], style: Style, where: str) -> list[str]:
    """Return all accepted answers or references of a sample.

    Args:
        task: Key of :data:`SPECS`.
        rows: Its rows; more than one for captions only.
        style: Whose words; ``lmms_eval`` takes letters for IconQA's choices.
        where: Data set and sample, for messages.

    Raises:
        DataError: It has no answer, or one that is not among its choices.
    """
    if task in CAPTIONING:
        return [caption for row in rows for caption in captions(row["captions"], where)]
    if task == "iconqa":
        return [_iconqa_answer(rows[0], read_choices(rows[0]), style, where)]
    accepted = texts(rows[0]["answers"], "answers", where)
    return accepted[:1] if task == "chartqa" else accepted  # ChartQA is scored by its first label


def captions(value: Any, where: str) -> list[str]:
    """Return captions, stripped: a text, a dict with the text under "raw", or a list of either."""
    listed = value if isinstance(value, list) else [value]
    raw = [entry.get("raw") if isinstance(entry, Mapping) else entry for entry in listed]
    return [text.strip() for text in texts(raw, "captions", where)]


def texts(value: Any, what: str, where: str) -> list[str]:
    """Return a list of texts from one or several; dicts hold theirs under "answer".

    Raises:
        DataError: There is none, or something else is among them.
    """
    listed = value if isinstance(value, list) else [value]
    plain = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed]
    if not plain or not all(isinstance(text, str) for text in plain):
        raise DataError(
            f"{where}: its {what} are {value!r}; expected at least one text. Rows without answers, as hidden test "
            "splits have them, cannot be scored."
        )
    return plain


def read_choices(row: Mapping[str, Any]) -> list[str] | None:
    """Return the choices of an IconQA row: none where it is to be filled in, None where the data speak of none."""
    if "choices" not in row:
        return None
    listed = row["choices"]
    if isinstance(listed, str):
        listed = listed.split(",") if listed else []
    return [str(choice).strip() for choice in listed or []]


def _iconqa_answer(row: Mapping[str, Any], choices: Sequence[str] | None, style: Style, where: str) -> str:
    """Return the answer's text, or its letter where letters are asked for; data hold text, letter or index."""
    answer = row["answer"]
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not choices:
        return texts(str(answer) if isinstance(answer, int) else answer, "answers", where)[0]
    letters = [letter(i) for i in range(len(choices))]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        index = answer
    elif isinstance(answer, str) and answer.strip() in choices:
        index = choices.index(answer.strip())
    elif isinstance(answer, str) and answer.strip() in letters:
        index = letters.index(answer.strip())
    else:
        raise DataError(
            f"{where}: its answer {answer!r} is none of its choices {list(choices)}, nor a letter or index."
        )
    return letters[index] if style == "lmms_eval" else choices[index]
