import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from datamodules.joint import JointDataModule
from datamodules.nli import LABELS, NLIDataModule, nli_tasks
from datamodules.sources import Place, TrainTestSplit
from datamodules.tokenizer import load_tokenizer
from datamodules.twins.models import write_llama
from datamodules.twins.nli import ENDINGS, write_nli
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

SICK = Path(__file__).parents[2].parent / "shared" / "data" / "sick"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    root = tmp_path_factory.mktemp("nli")
    return write_llama(root / "llama"), write_nli(root / "data", rows=20, train_rows=30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def opened(twin):
    def build(task, **options):
        data = NLIDataModule(task, str(twin[0]), **{"source": str(twin[1][task]), **options})
        data.prepare_data()
        data.setup()
        return data

    return build


def pairs(data, split):
    rows = data.dataset(split)
    return [(row["text_a"], row["text_b"], rows.labels[i]) for i in range(len(rows)) for row in [rows.table[i]]]


@pytest.mark.parametrize(
    ("task", "sizes", "labels", "masked"),
    [
        ("mnli", (30, 4, 16), {0, 1, 2}, None),
        ("qnli", (30, 4, 16), {0, 2}, 1),
        ("snli", (30, 20, 20), {0, 1, 2}, None),
        ("rte", (30, 10, 10), {0, 2}, 1),
        ("sick", (30, 20, 20), {0, 1, 2}, None),
        ("scitail", (30, 20, 20), {0, 1}, 2),
    ],
)
def test_every_task_has_its_splits_and_labels(opened, task, sizes, labels, masked):
    data = opened(task)
    rows = {split: pairs(data, split) for split in SPLITS}
    assert tuple(map(len, rows.values())) == sizes
    assert {label for split in SPLITS for *_, label in rows[split]} == labels
    assert data.task.mask_class == masked
    assert masked not in labels
    # The twin writes the label into the text, so a label that is read wrongly shows.
    for split in SPLITS:
        for _, second, label in rows[split]:
            assert second.endswith(ENDINGS["contradiction" if label == 2 else LABELS[label]])
    assert data.describe()["data"] == "stand-in: made-up sentence pairs in the layouts of the six NLI data sets"


def test_validation_is_what_train_test_split_calls_test(opened, twin):
    lines = [json.loads(line) for line in (twin[1]["mnli"] / "validation.jsonl").read_text().splitlines()]
    texts = [(line["text1"], line["text2"]) for line in lines]
    data = opened("mnli")  # cut without shuffling: the tail is val
    assert [row[:2] for row in pairs(data, "val")] == texts[16:]
    assert [row[:2] for row in pairs(data, "test")] == texts[:16]
    lines = [json.loads(line) for line in (twin[1]["qnli"] / "validation.jsonl").read_text().splitlines()]
    test, val = TrainTestSplit(0.2).indices(20)
    data = opened("qnli")
    assert [row[0] for row in pairs(data, "val")] == [lines[i]["text1"] for i in val]
    assert [row[0] for row in pairs(data, "test")] == [lines[i]["text1"] for i in test]


@pytest.mark.parametrize(
    ("task", "rows", "sizes"), [("mnli", 9815, (1963, 7852)), ("qnli", 5463, (1093, 4370)), ("rte", 277, (139, 138))]
)
def test_published_sizes_give_the_published_splits(task, rows, sizes):
    spec = nli_tasks()[task].spec
    cut = {split: spec.splits[split].cut.indices(rows)[spec.splits[split].side] for split in ("val", "test")}
    assert (len(cut["val"]), len(cut["test"])) == sizes
    assert not set(cut["val"]) & set(cut["test"])


def test_hub_ids_are_the_published_ones():
    places = {task: [str(place) for place in nli_tasks()[task].spec.places] for task in nli_tasks()}
    assert places["mnli"] == ["SetFit/mnli", "nyu-mll/glue:mnli"]
    assert places["snli"] == ["stanfordnlp/snli"]
    assert places["sick"] == ["DefenceLab/sick", "RobZamp/sick", "RobZamp/sick@refs/convert/parquet"]
    assert nli_tasks()["scitail"].spec.places[0] == Place("allenai/scitail", "tsv_format")


def test_unlabelled_rows_of_snli_are_dropped(opened, twin):
    published = load_from_disk(str(twin[1]["snli"]))["validation"]
    assert published["label"].count(-1) == 2
    assert len(opened("snli").dataset("val")) == len(published) - 2


def test_pairs_are_joined_by_the_tokenizers_own_template(opened, twin):
    data = opened("rte")
    first, second, label = pairs(data, "val")[0]
    sample = data.dataset("val")[0]
    assert sample.keys() == {"input_ids", "attention_mask", "target"}
    tokenizer = load_tokenizer(str(twin[0]))
    bos = [tokenizer.bos_token_id]
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second))
    assert sample["input_ids"].tolist() == bos + one + bos + two  # and no end token
    assert sample["attention_mask"].tolist() == [1] * len(sample["input_ids"])
    assert sample["target"].dtype == torch.int64
    assert sample["target"].item() == label


def test_batches_are_padded_right_to_their_longest(opened):
    data = opened("snli", batch_size=8)
    batch = next(iter(data.train_dataloader()))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (8, int(lengths.max()))
    assert len(set(lengths.tolist())) > 1
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in batch["attention_mask"])
    assert batch["target"].shape == (8,)


def test_long_pairs_are_cut_to_the_limit(opened, tmp_path):
    assert opened("scitail").max_length == 1000
    assert opened("mnli").max_length == 2000
    data = opened("scitail", max_length=12)
    assert len(data.dataset("val")[0]["input_ids"]) == 12
    lines = "".join(f"{'word ' * 3000}\tshort\tentails\n" for _ in range(2))
    (tmp_path / "long_dev.tsv").write_text(lines)
    data = opened("scitail", source=str(tmp_path / "long_dev.tsv"), max_length=5000)
    assert len(data.dataset("val")[0]["input_ids"]) == 2048  # the tokenizer's own limit


def test_a_merge_sees_no_labels(opened):
    data = opened("mnli")
    assert data.unlabelled("val")[0].keys() == {"input_ids", "attention_mask"}


def test_tasks_join_and_carry_what_they_stand_in_for(twin):
    tasks = {task: NLIDataModule(task, str(twin[0]), str(folder)) for task, folder in twin[1].items()}
    joint = JointDataModule(tasks, batch_size=2, val_samples=4)
    joint.prepare_data()
    joint.setup("fit")
    batch = next(iter(joint.train_dataloader()))
    assert list(batch) == list(twin[1])
    assert all(inputs.keys() == {"input_ids", "attention_mask"} for inputs in batch.values())
    assert joint.note == "stand-in: made-up sentence pairs in the layouts of the six NLI data sets"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a\tb\tmaybe\n", "'maybe'; known are 'entails', 'neutral'"),
        ("a\tb\tcontradiction\n", "none of 1 rows has a label that SciTail uses"),
    ],
)
def test_labels_that_are_unknown_or_unused_are_told_apart(opened, tmp_path, rows, said):
    (tmp_path / "test.tsv").write_text(rows)
    with pytest.raises(DataError, match=said):
        opened("scitail", source=str(tmp_path)).dataset("test")


def test_a_missing_text_is_named(opened, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"premise": "a", "hypothesis": null, "label": 0}\n' * 2)
    with pytest.raises(DataError, match="row 1 of the split has an empty text"):
        opened("snli", source=str(tmp_path)).dataset("test")[1]


def test_other_mistakes_are_named(twin, opened, tmp_path):
    with pytest.raises(ConfigError, match="no NLI task 'wnli'; known are mnli, qnli"):
        NLIDataModule("wnli", str(twin[0]))
    with pytest.raises(ConfigError, match="RTE: the 'val' split is not open yet"):
        NLIDataModule("rte", str(twin[0])).dataset("val")
    (tmp_path / "train.jsonl").write_text('{"text1": "a", "text2": "b", "label": 0}\n')
    with pytest.raises(DatasetNotFoundError, match=r"RTE: .* has no split 'validation' or .*it holds train\.jsonl"):
        opened("rte", source=str(tmp_path)).dataset("test")


def test_twins_are_the_same_every_time(tmp_path):
    folders = [write_nli(tmp_path / name, rows=10, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    texts = [(f["scitail"] / "scitail_1.0_dev.tsv").read_text() for f in folders]
    assert [a == b for a, b in pairwise(texts)] == [True, False]


@pytest.mark.skipif(not SICK.is_dir(), reason="the real SICK data lie beside the project's checkout")
def test_the_real_sick_is_read_as_published(twin):
    data = NLIDataModule("sick", str(twin[0]), str(SICK))
    data.setup()
    assert {split: len(data.dataset(split)) for split in SPLITS} == {"train": 4500, "val": 500, "test": 4927}
    assert pairs(data, "val")[0] == (
        "The young boys are playing outdoors and the man is smiling nearby",
        "There is no boy playing outdoors and there is no man smiling",
        LABELS.index("contradiction"),
    )
