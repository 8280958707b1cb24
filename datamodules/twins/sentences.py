"""Short made-up sentences, and how the twins of text suites are written."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources.local import STAND_IN

WHO = ("a dog", "a child", "the farmer", "two girls", "an old man", "the cook", "a red bird", "the teacher")
DOES = ("sleeps", "sings", "runs", "reads a book", "plays the drum", "eats an apple", "waits", "paints a wall")
WHERE = ("in the garden", "at home", "near the river", "on the roof", "in the snow", "by the road")

#: Rows of one split, as ``{column: value}``.
Rows = list[dict[str, Any]]


def draws(*parts: object) -> random.Random:
    """Return a generator that depends on ``parts`` alone."""
    return random.Random("/".join(map(str, parts)))


def sentence(draw: random.Random) -> str:
    """Return a sentence without its full stop, one of 384."""
    return f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHERE)}"


def balanced(values: Sequence[Any], count: int, draw: random.Random) -> list[Any]:
    """Return ``count`` values in random order, each as often as any other, give or take one."""
    drawn = [values[i % len(values)] for i in range(count)]
    draw.shuffle(drawn)
    return drawn


def write_jsonl(file: Path, rows: Rows) -> None:
    """Write one json object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def write_parquet(file: Path, rows: Rows, features: Mapping[str, Any]) -> None:
    """Write a parquet file that remembers the names of its labels, as those of the hub do."""
    from datasets import Dataset, Features

    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(file))


def write_stand_in(folder: Path, what: str) -> None:
    """Say beside the data what they stand in for; every result made from them repeats it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAND_IN).write_text(f"stand-in: made-up {what}\n", "utf-8")
