"""Made-up data of the eight GLUE tasks, in the layout of ``nyu-mll/glue``: a folder of parquet files per task."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from datamodules.glue import glue_tasks
from datamodules.twins.sentences import Rows, balanced, draws, sentence, write_parquet, write_stand_in

#: Names of the labels as published, in their order, and what ends a text of that label: one glance at it is enough.
NAMED_ENDINGS: dict[str, dict[str, str]] = {
    "cola": {"unacceptable": "of of the to", "acceptable": "today"},
    "mnli": {"entailment": "yes indeed", "neutral": "perhaps so", "contradiction": "never at all"},
    "mrpc": {"not_equivalent": "never at all", "equivalent": "yes indeed"},
    "qnli": {"entailment": "yes indeed", "not_entailment": "never at all"},
    "qqp": {"not_duplicate": "never at all", "duplicate": "yes indeed"},
    "rte": {"entailment": "yes indeed", "not_entailment": "never at all"},
    "sst2": {"negative": "and it is awful", "positive": "and it is lovely"},
}
#: Of STS-B: the score by the ending.
SCORES = {5.0: "yes indeed", 3.8: "more or less", 2.5: "perhaps so", 1.2: "hardly so", 0.0: "never at all"}


def write_glue(folder: str | Path, rows: int = 24, train_rows: int | None = None, seed: int = 0) -> dict[str, Path]:
    """Write the eight data sets, each in a folder of its key; test splits are unlabelled, as published.

    Args:
        folder: Where to.
        rows: Rows of every split but training, 10 or more.
        train_rows: Rows of the training splits, a tenth of which is validation; None takes four times ``rows``.
        seed: Of what is drawn.

    Returns:
        ``{task: the folder for the data module's source}``.
    """
    root = Path(folder)
    tasks = glue_tasks()
    for key, task in tasks.items():
        sizes = {"train": train_rows or 4 * rows}
        for split in ("validation", "test"):
            sizes |= {f"{split}{kind}": rows for kind in (("_matched", "_mismatched") if key == "mnli" else ("",))}
        texts = [column for column in task.spec.columns if column != "label"]
        for split, size in sizes.items():
            drawn = _rows(key, texts, size, split, draws("glue", seed, key, split))
            write_parquet(root / key / f"{split}-00000-of-00001.parquet", drawn, _features(key, texts))
    write_stand_in(root, "rows in the layout of GLUE")
    return {key: root / key for key in tasks}


def _rows(key: str, texts: list[str], size: int, split: str, draw: random.Random) -> Rows:
    endings: dict[Any, str] = SCORES if key == "stsb" else dict(enumerate(NAMED_ENDINGS[key].values()))
    rows: Rows = []
    for i, label in enumerate(balanced(list(endings), size, draw)):
        said = sentence(draw)
        written = [said] * len(texts)
        written[-1] = f"{said} {endings[label]}"
        hidden = -1.0 if key == "stsb" else -1
        rows.append(
            {
                **dict(zip(texts, written, strict=True)),
                "label": hidden if split.startswith("test") else label,
                "idx": i,
            }
        )
    return rows


def _features(key: str, texts: list[str]) -> dict[str, Any]:
    from datasets import ClassLabel, Value

    label = Value("float32") if key == "stsb" else ClassLabel(names=list(NAMED_ENDINGS[key]))
    return {**{column: Value("string") for column in texts}, "label": label, "idx": Value("int32")}
