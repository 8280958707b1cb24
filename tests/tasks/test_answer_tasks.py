"""The tasks that answer in words: which metric, under which name, and what a record says of it."""

import pytest

from nscmerge.errors import DataError
from tasks import captioning, llava4, text_to_text, vqa
from tasks.base import Task

#: Task, its options, an answer, what is accepted, and the score that this gives.
CASES = [
    (vqa.VizWizVQA, {}, "the red", [*["red"] * 3, *["blue"] * 7], 0.9),
    (vqa.IconQA, {}, "B. seven", ["b"], 1.0),
    (vqa.IconQA, {}, "b ", ["b"], 0.0),
    (vqa.ChartQA, {}, "10.4", ["10"], 1.0),
    (vqa.ChartQA, {}, "10.6", ["10"], 0.0),
    (vqa.DocVQA, {}, "march 4", ["March 5", "x"], 6 / 7),
    (text_to_text.TextToText, {}, "yes", ["yes"], 1.0),
    (text_to_text.TextToText, {}, "Yes", ["yes"], 0.0),
    (llava4.StrictIconQA, {}, "SEVEN", ["seven"], 1.0),
    (llava4.StrictIconQA, {}, "B. seven", ["b"], 0.0),
    (llava4.ImageNetNaming, {}, "a tabby cat", ["Tabby"], 1.0),
    (llava4.ImageNetNaming, {}, "", ["Tabby"], 1.0),
    (llava4.ImageNetNaming, {"strict": True}, "", ["Tabby"], 0.0),
    (llava4.ScienceQA, {}, "The answer is B.", ["B"], 1.0),
    (llava4.ScienceQA, {}, "probably B", ["B"], 0.0),
]


@pytest.mark.parametrize(("kind", "options", "answer", "accepted", "score"), CASES)
def test_each_task_scores_by_its_own_rule(kind, options, answer, accepted, score):
    task = kind("somewhere", **options)
    metrics = task.metrics()
    metrics.update([answer], [accepted])
    found = metrics.compute()
    assert float(found[task.primary]) == pytest.approx(score)
    assert float(found["empty_answers"]) == (answer == "")


@pytest.mark.parametrize("kind", [captioning.Captioning, llava4.VizWizCaption])
def test_captions_are_scored_over_the_whole_split(kind):
    options = {"ptb": "simple"} | ({"mean7": False} if kind is llava4.VizWizCaption else {})
    task = kind("somewhere", **options)
    assert task.primary == "cider"
    metrics = task.metrics()
    metrics.update(["a red square", "two blue dots"], [["a red square"], ["two blue dots on white"]])
    one, _ = metrics.compute()["cider"], metrics.update([""], [["a green line"]])
    two = metrics.compute()
    assert 0 < float(two["cider"]) != float(one)
    assert int(two["empty_answers"]) == 1
    notes = " ".join(task.notes())
    assert "at most 128 new tokens" in notes
    assert "simple" in notes  # an approximation of the tokenizer must be named


def test_similarity_is_a_rank_correlation_of_what_can_be_read():
    task = text_to_text.TextSimilarity("somewhere")
    metrics = task.metrics()
    metrics.update(["1.0", "2.5", "x"], [["2.0"], ["5.0"], ["0.0"]])
    assert float(metrics.compute()["spearman"]) == pytest.approx(1.0)


def test_the_mean_of_seven_is_primary_where_it_is_computed():
    assert llava4.VizWizCaption("somewhere").primary == "caption_mean7"


@pytest.mark.parametrize(
    "task",
    [
        vqa.DocVQA("somewhere", 32),
        captioning.Captioning("somewhere", 64, ptb="simple"),
        text_to_text.TextSimilarity("somewhere"),
        llava4.ImageNetNaming("somewhere", strict=True),
        llava4.VizWizCaption("somewhere", mean7=False),
    ],
)
def test_a_task_is_built_again_from_its_record_and_has_no_head(task):
    again = type(task)(**task.config()["init_args"])
    assert again.config() == task.config()
    assert again.primary == task.primary
    assert not task.state_dict()
    task.load_head({}, "expert")
    assert isinstance(task, Task)
    assert task.outputs == "tokens"


def test_published_lengths_are_the_defaults():
    assert vqa.ChartQA("x").max_new_tokens == llava4.StrictIconQA("x").max_new_tokens == 128
    assert llava4.ScienceQA("x").max_new_tokens == llava4.ImageNetNaming("x").max_new_tokens == 1024
    assert text_to_text.TextToText("x").max_new_tokens == 9  # and the start token: max_length 10
    assert "counts as right" in " ".join(llava4.ImageNetNaming("x").notes())


def test_a_sample_without_any_answer_is_an_error():
    with pytest.raises(DataError, match="at least one"):
        vqa.VizWizVQA("x").metrics().update(["red"], [[]])
