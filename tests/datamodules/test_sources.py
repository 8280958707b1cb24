import hashlib
import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch.utils.data import random_split

from datamodules.sources import DatasetSpec, LabelMap, Part, Place, RandomSplit, TrainTestSplit, open_source
from datamodules.sources.table import Table
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

# Made by datasets 5.2.0 itself; reference, seeds and hash rule stand in the file.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metric_splits_and_orders.json").read_text())
ROWS = [{"premise": f"text {i}", "gold": i % 3} for i in range(10)]
SPEC = DatasetSpec(
    "Toy",
    [Place("owner/toy", "pairs")],
    {"text": ("text1", "premise"), "label": ("label", "gold"), "extra": "extra"},
    {
        "train": Part("train"),
        "val": Part(("validation", "dev"), cut=TrainTestSplit(0.2), side=1),
        "test": Part(("validation", "dev"), cut=TrainTestSplit(0.2), side=0),
    },
    optional=frozenset({"extra"}),
    header=("premise", "gold"),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def texts(table):
    return [row["text"] for row in (table[i] for i in range(len(table)))]


def jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("golden", GOLDEN["splits"], ids=lambda g: f"{g['rows']}-{g['test_size']}")
def test_cuts_equal_the_golden_indices(golden):
    cut = TrainTestSplit(golden["test_size"], golden["shuffle"], golden["seed"])
    parts = dict(zip(("train", "test"), cut.indices(golden["rows"]), strict=True))
    for part, indices in parts.items():
        assert len(indices) == golden[f"n_{part}"]
        assert indices[:10] == golden[f"{part}_first10"]
        digest = hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest()
        assert digest == golden[f"{part}_sha256_csv"]
    assert sorted(parts["train"] + parts["test"]) == list(range(golden["rows"]))


@pytest.mark.parametrize(
    ("rows", "size", "shuffle"), [(2, 0.5, True), (7, 0.3, True), (101, 0.8, True), (7, 0.3, False)]
)
def test_cuts_equal_those_of_datasets(rows, size, shuffle):
    cut = Dataset.from_dict({"i": list(range(rows))}).train_test_split(size, shuffle=shuffle, seed=5)
    assert TrainTestSplit(size, shuffle, seed=5).indices(rows) == (cut["train"]["i"][:], cut["test"]["i"][:])


def test_random_cuts_equal_those_of_torch():
    first, second = random_split(range(57), [52, 5], torch.Generator().manual_seed(3))
    assert RandomSplit(0.1, seed=3).indices(57) == (list(first.indices), list(second.indices))
    train, val = RandomSplit(0.1, seed=3, at_most=2).indices(57)
    assert (len(train), len(val)) == (55, 2)
    assert sorted(train + val) == list(range(57))


def test_a_part_without_rows_is_refused():
    with pytest.raises(ConfigError, match="1 rows cannot be cut into parts of 0 and 1"):
        TrainTestSplit(0.5).indices(1)
    with pytest.raises(ConfigError, match="3 rows cannot be cut into parts of 3 and 0"):
        RandomSplit(0.1).indices(3)


def saved(root):
    DatasetDict({"train": Dataset.from_list(ROWS[:4]), "validation": Dataset.from_list(ROWS)}).save_to_disk(root)


def saved_one_by_one(root):
    for name, rows in (("train", ROWS[:4]), ("dev", ROWS)):
        Dataset.from_list(rows).save_to_disk(root / name)


def shards(root):
    for i in range(2):
        part = Dataset.from_list(ROWS[5 * i : 5 * i + 5])
        part.to_parquet(root / "data" / f"validation-0000{i}-of-00002-0123456789abcdef.parquet")
    Dataset.from_list(ROWS[:4]).to_parquet(root / "data" / "train-00000-of-00001.parquet")


def converted(root):
    for name, rows in (("train", ROWS[:4]), ("validation", ROWS)):
        Dataset.from_list(rows).to_parquet(root / "pairs" / name / "0000.parquet")
        Dataset.from_list(ROWS[:1]).to_parquet(root / "singles" / name / "0000.parquet")


def json_lines(root):
    jsonl(root / "train.jsonl", ROWS[:4])
    jsonl(root / "dev.jsonl", ROWS)


def separated(separator, header, suffix):
    def write(root):
        for name, rows in (("train", ROWS[:4]), ("dev", ROWS)):
            lines = [["premise", "gold"]] * header + [[row["premise"], str(row["gold"])] for row in rows]
            (root / f"toy_1.0_{name}.{suffix}").write_text("".join(separator.join(line) + "\n" for line in lines))

    return write


@pytest.mark.parametrize(
    "write",
    [
        saved,
        saved_one_by_one,
        shards,
        converted,
        json_lines,
        separated(",", True, "csv"),
        separated("\t", False, "tsv"),
        separated("\t", True, "txt"),
    ],
)
def test_every_local_layout_gives_the_same_rows(tmp_path, write):
    root = tmp_path / "data"
    (root / "data").mkdir(parents=True)
    write(root)
    opened = open_source(SPEC, str(root))
    assert texts(opened.split("train")) == [row["premise"] for row in ROWS[:4]]
    kept, held_out = TrainTestSplit(0.2).indices(10)
    assert texts(opened.split("val")) == [ROWS[i]["premise"] for i in held_out]
    table = opened.split("test")
    assert table.column("label") == [ROWS[i]["gold"] for i in kept]
    assert "extra" not in table
    assert opened.describe() == {"source": str(root)}


def test_one_file_is_its_split_and_no_other(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    opened = open_source(SPEC, str(tmp_path / "train.jsonl"))
    assert len(opened.split("train")) == 10
    with pytest.raises(DatasetNotFoundError, match="no split 'validation' or 'dev', which 'val' is made from"):
        opened.split("val")


def test_a_saved_split_keeps_its_name(tmp_path):
    named = Dataset.from_list(ROWS, split="train")
    named.save_to_disk(tmp_path / "named")
    assert len(open_source(SPEC, str(tmp_path / "named")).split("train")) == 10
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "nameless")
    with pytest.raises(DatasetNotFoundError, match="one saved split without a name"):
        open_source(SPEC, str(tmp_path / "nameless"))


def test_words_of_missing_values_and_quotes_stay_texts(tmp_path):
    (tmp_path / "train.tsv").write_text('None\t0\nhe said "no\t1\nNA\t2\n')
    assert open_source(SPEC, str(tmp_path)).split("train").column("text") == ["None", 'he said "no', "NA"]


def test_images_lie_in_a_folder_per_class(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            file = tmp_path / split / label / "0.png"
            file.parent.mkdir(parents=True)
            image.new("RGB", (3, 2), colour).save(file)
    spec = DatasetSpec("Colours", [], {"image": "image", "label": "label"}, {"test": Part("test")})
    table = open_source(spec, str(tmp_path)).split("test")
    assert table.class_names("label") == ["blue", "red"]
    assert [(table[i]["image"].getpixel((0, 0)), table[i]["label"]) for i in range(2)] == [
        ((0, 0, 255), 0),
        ((255, 0, 0), 1),
    ]
    raw = table.undecoded("image")[1]["image"]
    assert Path(raw["path"]) == tmp_path / "test" / "red" / "0.png"


def test_splits_may_be_marked_in_a_column(tmp_path):
    jsonl(tmp_path / "test.jsonl", [{"premise": str(i), "part": "val" if i % 3 else "test"} for i in range(6)])
    spec = DatasetSpec(
        "Marked",
        [],
        {"text": "premise", "part": "part"},
        {"val": Part("test", where=("part", "val")), "train": Part("test", where=("part", "train"))},
    )
    opened = open_source(spec, str(tmp_path))
    assert texts(opened.split("val")) == ["1", "2", "4", "5"]
    with pytest.raises(DataError, match="has no rows with part = 'train'; 'train' needs some"):
        opened.split("train")
    with pytest.raises(ConfigError, match="Marked has no split 'test'; it has val, train"):
        opened.split("test")


def test_rows_are_dropped_before_the_cut(tmp_path):
    jsonl(tmp_path / "dev.jsonl", ROWS)
    opened = open_source(SPEC, str(tmp_path))
    table = opened.split("test", lambda rows: [i for i, gold in enumerate(rows.column("label")) if gold])
    left = [row for row in ROWS if row["gold"]]
    assert texts(table) == [left[i]["premise"] for i in TrainTestSplit(0.2).indices(len(left))[0]]
    with pytest.raises(DataError, match="none of 10 rows has a label that Toy uses"):
        opened.split("test", lambda rows: [])


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda r: (r / "train.csv").write_text("premise,gold\nx,1\n"), DataError, "'train' as .csv and as .jsonl"),
        (lambda r: (r / "train.jsonl").write_text("{no json"), DataError, r"train.jsonl cannot be read as json: "),
        (
            lambda r: (r / "train.jsonl").write_text('{"hypothesis": "x"}\n'),
            DataError,
            "no column 'text1' or 'premise', ",
        ),
        (lambda r: (r / "train.jsonl").unlink(), DatasetNotFoundError, "no split 'train'.*holds dev.jsonl"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, spoil, error, said):
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "dev.jsonl", ROWS)
    spoil(tmp_path)
    with pytest.raises(error, match=said):
        open_source(SPEC, str(tmp_path)).split("train")


def test_a_missing_folder_says_what_it_must_hold(tmp_path):
    with pytest.raises(
        DatasetNotFoundError, match=r"is not there.*text1 \| premise, label \| gold, extra \(optional\)"
    ):
        open_source(SPEC, str(tmp_path / "nowhere"))


def test_a_damaged_saved_split_is_named(tmp_path):
    saved(tmp_path / "d")
    next((tmp_path / "d" / "train").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="saved split 'train' cannot be read"):
        open_source(SPEC, str(tmp_path / "d")).split("train")


def labelled(values, feature):
    return Table(Dataset.from_dict({"y": values}, features=Features({"y": feature})), {"label": "y"}, "Toy: there")


LABELS = LabelMap({"entailment": 0, "not entailment": 2}, {0: 0, 1: 2}, dropped=frozenset({"unsure"}))


@pytest.mark.parametrize(
    ("values", "feature", "read"),
    [
        ([0, 1, -1, 5], Value("int64"), [0, 2, None, None]),
        (["0", "1"], Value("string"), [0, 2]),
        ([0.0, 1.0, float("nan")], Value("float64"), [0, 2, None]),
        (["Entailment", "not_entailment", "-", "", None, "unsure"], Value("string"), [0, 2, None, None, None, None]),
        # Numbered the other way round: the names count.
        ([0, 1, -1], ClassLabel(names=["not-entailment", "entailment"]), [2, 0, None]),
        ([0, 1], ClassLabel(names=["0", "1"]), [0, 2]),
    ],
)
def test_labels_are_read_by_name_where_they_have_one(values, feature, read):
    assert LABELS.read(labelled(values, feature)) == read


def test_an_unknown_label_is_named():
    with pytest.raises(DataError, match="Toy: there: column 'label' holds the label 'maybe'; known are 'entailment'"):
        LABELS.read(labelled(["entailment", "maybe"], Value("string")))
    with pytest.raises(DataError, match="holds the label 'maybe'"):
        LABELS.read(labelled([0, 1], ClassLabel(names=["entailment", "maybe"])))
    with pytest.raises(DataError, match=r"holds the label 0.5; expected a name or a whole number"):
        LABELS.read(labelled([0.0, 0.5], Value("float64")))
    with pytest.raises(DataError, match=r"column 'label' holds \[1\]; expected one label per row"):
        LABELS.read(Table(Dataset.from_dict({"y": [[1], [0]]}), {"label": "y"}, "Toy"))
