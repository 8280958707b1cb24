import pytest
import torch
from datasets import Dataset

from datamodules.glue import GLUEDataModule, glue_tasks
from datamodules.sources import RandomSplit
from datamodules.tokenizer import load_tokenizer
from datamodules.twins.glue import NAMED_ENDINGS, SCORES, write_glue
from datamodules.twins.models import write_t5
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
#: Input text of a row with these columns, and the answers to label 0, 1, 2: spec/language_tasks.md, section 5.
ROW = {
    **{name: name.upper() for name in ("sentence", "premise", "hypothesis", "sentence1", "sentence2")},
    **{name: name.upper() for name in ("question", "question1", "question2")},
}
TEXTS = {
    "cola": (
        "Indicate if the following sentence is grammatically correct or not: \"SENTENCE\". Answere 'acceptable' or "
        "'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "mnli": (
        "Does the premise: 'PREMISE' logically imply, contradict, or is neutral to the hypothesis: 'HYPOTHESIS'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
    ),
    "mrpc": (
        "Are the following sentences 'SENTENCE1' and 'SENTENCE2' conveying the same meaning? Answere with 'yes' or "
        "'no'.",
        ("no", "yes"),
    ),
    "qnli": (
        "Given the context: 'SENTENCE', does the question 'QUESTION' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "qqp": (
        "Do the questions 'QUESTION1' and 'QUESTION2' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": (
        "Does the text: 'SENTENCE1' entail that 'SENTENCE2' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "sst2": (
        "Given the sentence 'SENTENCE', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": (
        "Consider the sentences 'SENTENCE1' and 'SENTENCE2'. On a scale from 1 (completely different) to 5 (completely "
        "similar), rate the similarity.",
        (),
    ),
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    return write_t5(root / "t5"), write_glue(root / "data", rows=10, train_rows=30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def opened(twin):
    def build(task, **options):
        data = GLUEDataModule(task, str(twin[0]), **{"source": str(twin[1][task]), **options})
        data.prepare_data()
        data.setup()
        return data

    return build


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_the_published_ones(task):
    text, answers = TEXTS[task]
    assert glue_tasks()[task].text(ROW) == text
    assert glue_tasks()[task].answers == answers
    assert [str(place) for place in glue_tasks()[task].spec.places] == [f"nyu-mll/glue:{task}", f"glue:{task}"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_answers_what_its_rows_say(opened, twin, task):
    data = opened(task)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [27, 3, 10]
    # The twin writes the label into the text, so a label that is read wrongly shows.
    if task == "stsb":
        endings = {f"{score:.1f}": ending for score, ending in SCORES.items()}
    else:
        endings = dict(zip(glue_tasks()[task].answers, NAMED_ENDINGS[task].values(), strict=True))
    last = [column for column in data.spec.columns if column != "label"][-1]
    for split in ("train", "val", "test"):
        rows = data.dataset(split)
        assert set(rows.targets) <= endings.keys()
        assert all(rows.table[i][last].endswith(endings[rows.targets[i]]) for i in range(len(rows)))
    assert data.describe()["data"] == "stand-in: made-up rows in the layout of GLUE"


def test_validation_is_cut_from_training_and_test_is_the_published_validation(opened, twin):
    data = opened("mnli")
    root = twin[1]["mnli"]
    published = Dataset.from_parquet(str(root / "train-00000-of-00001.parquet"))["premise"][:]
    train, val = RandomSplit(0.1, seed=0).indices(30)
    assert data.dataset("train").table.column("premise") == [published[i] for i in train]
    assert data.dataset("val").table.column("premise") == [published[i] for i in val]
    matched = Dataset.from_parquet(str(root / "validation_matched-00000-of-00001.parquet"))["premise"][:]
    assert data.dataset("test").table.column("premise") == matched


def test_scored_samples_hold_the_prompt_and_one_answer(opened, twin):
    data = opened("sst2")
    scored = data.dataset("val")
    sample = scored[0]
    assert sample.keys() == {"input_ids", "attention_mask", "target"}
    assert sample["target"] == [scored.targets[0]]
    tokenizer = load_tokenizer(str(twin[0]))
    assert tokenizer.decode(sample["input_ids"], skip_special_tokens=True) == data.task.text(scored.table[0])
    assert sample["input_ids"][-1] == tokenizer.eos_token_id
    assert data.unlabelled("val")[0].keys() == {"input_ids", "attention_mask"}


def test_training_samples_shift_the_answer_by_the_start_token(opened, twin):
    from transformers import T5ForConditionalGeneration

    data = opened("mrpc", batch_size=4)
    sample = data.supervised("train")[3]
    tokenizer = load_tokenizer(str(twin[0]))
    assert sample["target"].tolist() == tokenizer(data.dataset("train").targets[3])["input_ids"]
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "attention_mask", "decoder_input_ids", "target"}
    # transformers makes the same decoder inputs from the labels.
    model = T5ForConditionalGeneration.from_pretrained(twin[0])
    assert torch.equal(batch["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(batch["target"]))


def test_answers_of_several_lengths_pad_with_what_no_loss_counts(opened, twin):
    data = opened("mnli", batch_size=12)
    batch = next(iter(data.train_dataloader()))
    lengths = (batch["target"] != -100).sum(1)
    assert len(set(lengths.tolist())) > 1
    eos = load_tokenizer(str(twin[0])).eos_token_id
    assert all(row[n - 1] == eos and (row[n:] == -100).all() for row, n in zip(batch["target"], lengths, strict=True))


def test_long_inputs_are_cut_and_keep_their_end(opened, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "' + "word " * 900 + '", "label": 1}\n')
    rows = (tmp_path / "train.jsonl").read_text() * 10
    (tmp_path / "train.jsonl").write_text(rows)
    ids = opened("sst2", source=str(tmp_path), max_length=4000).dataset("train")[0]["input_ids"]
    assert (len(ids), int(ids[-1])) == (512, 1)


def test_scores_have_one_decimal_and_may_be_missing(opened, tmp_path):
    scores = [2.25, 3.7999999523162842, 0.0, -1.0, 5.0, 4.75, "NaN"]
    rows = "".join(f'{{"sentence1": "a", "sentence2": "b", "label": {score}}}\n' for score in scores)
    (tmp_path / "validation.jsonl").write_text(rows)
    assert opened("stsb", source=str(tmp_path)).dataset("test").targets == ["2.2", "3.8", "0.0", "5.0", "4.8"]
    (tmp_path / "validation.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "high"}\n')
    with pytest.raises(DataError, match="column 'label' holds 'high'; expected a score from 0 to 5"):
        opened("stsb", source=str(tmp_path)).dataset("test")


def test_the_whole_copy_of_the_repository_will_do(opened, twin):
    data = opened("rte", source=str(twin[1]["rte"].parent))
    assert data.dataset("test").targets == opened("rte").dataset("test").targets


def test_mistakes_are_named(opened, twin, tmp_path):
    with pytest.raises(ConfigError, match="no GLUE task 'wnli'; known are cola, mnli"):
        GLUEDataModule("wnli", str(twin[0]))
    (tmp_path / "validation.jsonl").write_text('{"sentence": null, "label": 1}\n' * 2)
    with pytest.raises(DataError, match=r"GLUE SST-2: .* row 1 of the split has no sentence"):
        opened("sst2", source=str(tmp_path)).dataset("test")[1]
    with pytest.raises(DatasetNotFoundError, match=r"no split 'train'.*it holds validation\.jsonl"):
        opened("sst2", source=str(tmp_path)).dataset("val")
    (tmp_path / "validation.jsonl").write_text('{"sentence": "x", "label": -1}\n' * 2)
    with pytest.raises(DataError, match="none of 2 rows has a label that GLUE SST-2 uses"):
        opened("sst2", source=str(tmp_path)).dataset("test")
