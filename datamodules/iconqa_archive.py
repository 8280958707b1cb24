"""IconQA's own archive to the two files that the data module reads: ``python -m datamodules.iconqa_archive``.

The sets that NSC's code was run on are not published. These hold what their sizes say that they hold: the questions on
one picture, those that choose among texts and those that are filled in (6,316 + 3,638 for validation).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError, NSCMergeError, OutputExistsError

SPLITS = ("train", "val")
#: Questions on one picture; "choose_img" chooses among several.
KINDS = ("choose_txt", "fill_in_blank")


def convert(archive: Path, output: Path) -> dict[str, int]:
    """Write ``train.jsonl`` and ``val.jsonl``; pictures stay where they are and are referred to.

    Args:
        archive: The unpacked archive, or its folder ``iconqa``, with ``{train,val}/{choose_txt,fill_in_blank}/ID/``.
        output: Folder to write, outside of the archive; must not hold the files yet.

    Returns:
        Number of questions by split.

    Raises:
        DatasetNotFoundError: The archive does not hold those folders.
        DataError: A question is incomplete.
        ConfigError: ``output`` and ``archive`` are inside of each other.
        OutputExistsError: A file is there already.
    """
    archive, output = archive.resolve(), output.resolve()
    root = next((f for f in (archive, archive / "iconqa", archive / "iconqa_data" / "iconqa") if _is_root(f)), None)
    if root is None:
        wanted = ", ".join(f"{split}/{kind}" for split in SPLITS for kind in KINDS)
        raise DatasetNotFoundError(
            f"IconQA: {archive} is not the unpacked archive; expected the folders {wanted} in it."
        )
    if output == archive or archive in output.parents or output in root.parents:
        raise ConfigError(
            f"IconQA: {output} and {archive} are inside of each other; choose an output folder beside it."
        )
    rows = {split: list(_questions(root, split, output)) for split in SPLITS}
    output.mkdir(parents=True, exist_ok=True)
    for split, questions in rows.items():
        try:
            with (output / f"{split}.jsonl").open("x", encoding="utf-8") as stream:
                stream.writelines(json.dumps(question) + "\n" for question in questions)
        except FileExistsError:
            raise OutputExistsError(f"IconQA: {output / f'{split}.jsonl'} is there already; remove it first.") from None
    return {split: len(questions) for split, questions in rows.items()}


def _is_root(folder: Path) -> bool:
    return all((folder / split / kind).is_dir() for split in SPLITS for kind in KINDS)


def _questions(root: Path, split: str, output: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of a split in the order of their numbers."""
    folders = [folder for kind in KINDS for folder in (root / split / kind).iterdir() if folder.is_dir()]
    for folder in sorted(folders, key=lambda f: (len(f.name), f.name)):
        try:
            asked = json.loads((folder / "data.json").read_text("utf-8"))
            answer, choices = asked["answer"], [str(choice) for choice in asked.get("choices") or []]
            if choices:
                answer = choices[int(answer)]
            question = str(asked["question"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"IconQA: {folder / 'data.json'} has no question with an answer: {error!r}.") from error
        yield {
            "question_id": folder.name,
            "image": os.path.relpath(folder / "image.png", output),
            "question": question,
            "choices": choices,
            "answer": str(answer),
            "ques_type": folder.parent.name,
        }


def main(args: Sequence[str] | None = None) -> None:
    """Run :func:`convert` from a command line."""
    parser = ArgumentParser(
        prog="python -m datamodules.iconqa_archive", description=str(convert.__doc__).partition("\n")[0]
    )
    parser.add_argument("archive", type=Path, help="the unpacked archive")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, for the data module's source")
    options = parser.parse_args(args)
    try:
        counts = convert(options.archive, options.output)
    except NSCMergeError as error:
        raise SystemExit(str(error)) from None
    print(f"IconQA written to {options.output}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
