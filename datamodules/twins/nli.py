"""Made-up data of the six NLI tasks, in the layouts and column names of the real ones."""

from __future__ import annotations

from pathlib import Path

from datamodules.nli import LABELS
from datamodules.twins.sentences import Rows, balanced, draws, sentence, write_jsonl, write_parquet, write_stand_in

#: What the second text adds to the first, by label: one glance at its end tells the label.
ENDINGS = {"entailment": "yes indeed", "neutral": "perhaps so", "contradiction": "never at all"}


def write_nli(folder: str | Path, rows: int = 24, train_rows: int | None = None, seed: int = 0) -> dict[str, Path]:
    """Write the six data sets, each in a folder of its key.

    MNLI and QNLI are SetFit's json lines, RTE is GLUE's parquet, SNLI is saved to disk with unlabelled rows among
    the others, SICK is parquet whose labels are numbered in an order of their own, and SciTail is tab separated
    without a header. Test splits that are published without labels have none here either.

    Args:
        folder: Where to.
        rows: Rows of every split, 10 or more.
        train_rows: Rows of the training splits; None takes ``rows``.
        seed: Of what is drawn.

    Returns:
        ``{task: the folder for the data module's source}``.
    """
    root = Path(folder)
    sizes = {"train": train_rows or rows, "validation": rows, "test": rows}
    for task, write in {
        "mnli": _setfit,
        "qnli": _setfit,
        "snli": _snli,
        "rte": _rte,
        "sick": _sick,
        "scitail": _scitail,
    }.items():
        labels = LABELS if task in ("mnli", "snli", "sick") else (LABELS[0], LABELS[1 if task == "scitail" else 2])
        pairs = {split: _pairs(labels, size, seed, task, split) for split, size in sizes.items()}
        write(root / task, pairs)
    write_stand_in(root, "sentence pairs in the layouts of the six NLI data sets")
    return {task: root / task for task in ("mnli", "qnli", "snli", "rte", "sick", "scitail")}


#: (first text, second text, label) of every row, by published split.
_Pairs = dict[str, list[tuple[str, str, str]]]


def _pairs(labels: tuple[str, ...], size: int, *key: object) -> list[tuple[str, str, str]]:
    draw = draws("nli", *key)
    pairs = []
    for label in balanced(labels, size, draw):
        said = sentence(draw)
        pairs.append((f"{said.capitalize()}.", f"{said} {ENDINGS[label]}", label))
    return pairs


def _setfit(folder: Path, pairs: _Pairs) -> None:
    two_way = folder.name == "qnli"
    names = ["entailment", "not entailment"] if two_way else list(LABELS)
    for split, drawn in pairs.items():
        lines: Rows = []
        for i, (first, second, label) in enumerate(drawn):
            name = "not entailment" if two_way and label != "entailment" else label
            number, text = (-1, "-1") if split == "test" else (names.index(name), name)
            lines.append({"text1": first, "text2": second, "label": number, "idx": i, "label_text": text})
        write_jsonl(folder / f"{split}.jsonl", lines)


def _rte(folder: Path, pairs: _Pairs) -> None:
    from datasets import ClassLabel, Value

    text, names = Value("string"), ClassLabel(names=["entailment", "not_entailment"])
    for split, drawn in pairs.items():
        lines: Rows = [
            {"sentence1": a, "sentence2": b, "label": -1 if split == "test" else int(label != LABELS[0]), "idx": i}
            for i, (a, b, label) in enumerate(drawn)
        ]
        features = {"sentence1": text, "sentence2": text, "label": names, "idx": Value("int32")}
        write_parquet(folder / f"{split}-00000-of-00001.parquet", lines, features)


def _snli(folder: Path, pairs: _Pairs) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    text, names = Value("string"), ClassLabel(names=list(LABELS))
    features = Features({"premise": text, "hypothesis": text, "label": names})
    saved = {}
    for split, drawn in pairs.items():
        lines: Rows = [{"premise": a, "hypothesis": b, "label": LABELS.index(label)} for a, b, label in drawn]
        # Annotators disagreed on these: published with label -1.
        unsure = [{"premise": a, "hypothesis": "Hard to say.", "label": -1} for a, _, _ in drawn[:2]]
        saved[split] = Dataset.from_list([unsure[0], *lines, unsure[1]], features=features)
    DatasetDict(saved).save_to_disk(str(folder))


def _sick(folder: Path, pairs: _Pairs) -> None:
    from datasets import ClassLabel, Value

    names = ["contradiction", "entailment", "neutral"]
    text = Value("string")
    for split, drawn in pairs.items():
        lines: Rows = [{"text_a": a, "text_b": b, "label": names.index(label)} for a, b, label in drawn]
        features = {"text_a": text, "text_b": text, "label": ClassLabel(names=names)}
        write_parquet(folder / f"{split}.parquet", lines, features)


def _scitail(folder: Path, pairs: _Pairs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, drawn in pairs.items():
        name = "dev" if split == "validation" else split
        lines = [f"{a}\t{b}\t{'entails' if label == LABELS[0] else 'neutral'}\n" for a, b, label in drawn]
        (folder / f"scitail_1.0_{name}.tsv").write_text("".join(lines), "utf-8")
