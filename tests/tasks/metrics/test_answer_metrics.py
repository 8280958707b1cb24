"""Scores of generated answers against the numbers of the released evaluation codes."""

import json
import math
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch

from nscmerge.errors import ConfigError, DataError, ShapeError
from tasks.metrics import (
    ANLS,
    EmptyAnswers,
    ExactMatch,
    IconQAAccuracy,
    ImageNetNamingAccuracy,
    RelaxedAccuracy,
    ScienceQAAccuracy,
    StrictIconQAAccuracy,
    TextSpearman,
    VQAAccuracy,
    accuracy,
    anls,
    average_accuracy,
    backward_transfer,
    exact_match,
    iconqa_accuracy,
    imagenet_naming_accuracy,
    normalize_vqa_answer,
    relaxed_accuracy,
    scienceqa_accuracy,
    scienceqa_choice,
    strict_iconqa_accuracy,
    text_spearman,
    vqa_accuracy,
)
from tasks.metrics.anls import levenshtein
from tasks.metrics.vqa_normalization import CONTRACTIONS

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"metric_{name}.json").read_text())


def in_batches(metric, predictions, targets, size=3):
    for start in range(0, len(predictions), size):
        metric.update(predictions[start : start + size], targets[start : start + size])
    return metric.compute()


def test_vqa_answers_are_normalized_as_published():
    cases = golden("vqa_accuracy")["normalization"]
    assert {case["raw"]: normalize_vqa_answer(case["raw"]) for case in cases} == {
        case["raw"]: case["normalized"] for case in cases
    }
    assert len(CONTRACTIONS) == 120
    assert normalize_vqa_answer("a. " * 40) == " ".join(["a."] * 8)  # no more than 32 periods go


def test_vqa_accuracy_equals_the_golden_numbers():
    case = golden("vqa_accuracy")
    rows = case["accuracy"]
    predictions, answers = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    got = [vqa_accuracy(*pair) for pair in zip(predictions, answers, strict=True)]
    assert got == pytest.approx([row["expected"] for row in rows], abs=1e-12)
    assert float(in_batches(VQAAccuracy(), predictions, answers)) == pytest.approx(case["expected_mean"], abs=1e-12)


def test_vqa_accuracy_of_few_people():
    assert vqa_accuracy("cat", ["cat"]) == 0  # nobody else to agree with
    assert vqa_accuracy("cat", ["cat", "Cat", "dog"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert vqa_accuracy("cat", ["cat"] * 4) == 1


def test_anls_equals_the_golden_numbers():
    case = golden("anls")
    rows = case["cases"]
    predictions, answers = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    got = [anls(*pair) for pair in zip(predictions, answers, strict=True)]
    assert got == pytest.approx([row["expected"] for row in rows], abs=1e-12)
    assert float(in_batches(ANLS(), predictions, answers)) == pytest.approx(case["expected_mean"], abs=1e-12)


def test_levenshtein_equals_a_table_and_its_bounds():
    words = ["", "a", "kitten", "sitting", "sunday", "saturday", "nittik", "aaaa", "ab" * 5]
    for a in words:
        for b in words:
            table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
            for i in range(1, len(a) + 1):
                for j in range(1, len(b) + 1):
                    change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                    table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, change)
            assert levenshtein(a, b) == table[-1][-1]
            common = sum(block.size for block in SequenceMatcher(None, a, b).get_matching_blocks())
            assert levenshtein(a, b) <= max(len(a), len(b)) * 2 - 2 * common  # one way to edit


def test_relaxed_accuracy_equals_the_golden_numbers():
    case = golden("relaxed_accuracy")
    rows = case["cases"]
    got = [relaxed_accuracy(row["prediction"], row["target"]) for row in rows]
    assert got == [float(row["expected"]) for row in rows]
    predictions, targets = [row["prediction"] for row in rows], [[row["target"], "unused"] for row in rows]
    mean = float(in_batches(RelaxedAccuracy(), predictions, targets))
    assert mean == pytest.approx(case["expected_mean"], abs=1e-12)
    assert relaxed_accuracy("1.05", "1") == relaxed_accuracy("0.95", "1") == 0  # by rounding, as published


@pytest.mark.parametrize(
    ("key", "function", "metric"),
    [
        ("iconqa_nsc", iconqa_accuracy, IconQAAccuracy),
        ("iconqa_mm_mergebench", strict_iconqa_accuracy, StrictIconQAAccuracy),
        ("imagenet_mm_mergebench", imagenet_naming_accuracy, ImageNetNamingAccuracy),
    ],
)
def test_named_choices_equal_the_golden_numbers(key, function, metric):
    rows = golden("generative_accuracy")[key]["cases"]
    expected = [float(row["expected"]) for row in rows]
    assert [function(row["prediction"], row["answer"]) for row in rows] == expected
    mean = in_batches(metric(), [row["prediction"] for row in rows], [[row["answer"]] for row in rows])
    assert float(mean) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_an_empty_name_is_right_unless_strict():
    assert imagenet_naming_accuracy("", "castle") == 1
    assert imagenet_naming_accuracy(" \n", "castle", strict=True) == 0
    assert float(in_batches(ImageNetNamingAccuracy(strict=True), ["", "Castle."], [["castle"]] * 2)) == 0.5


def test_scienceqa_equals_the_golden_numbers():
    case = golden("generative_accuracy")["scienceqa"]
    rows = case["cases"]
    assert [scienceqa_choice(row["prediction"], len(row["choices"])) for row in rows] == [
        row["expected_index"] for row in rows
    ]
    got = [scienceqa_accuracy(row["prediction"], row["answer"], len(row["choices"])) for row in rows]
    assert got == [row["expected_correct"] for row in rows]
    mean = in_batches(ScienceQAAccuracy(), [r["prediction"] for r in rows], [["ABCDE"[r["answer"]]] for r in rows])
    assert 100 * float(mean) == pytest.approx(case["expected_accuracy_percent"], abs=1e-9)


def test_scienceqa_reads_no_letter_beyond_the_choices():
    assert scienceqa_choice("The answer is C.", 3) == 2
    assert (
        scienceqa_choice("The answer is C.", 2) == scienceqa_choice("F") == scienceqa_choice("The answer is Q.") == -1
    )
    with pytest.raises(ConfigError, match="6 choices; ScienceQA has 1 to 5"):
        scienceqa_choice("A", 6)
    with pytest.raises(DataError, match="'blue' of a ScienceQA sample names no choice; expected a letter"):
        ScienceQAAccuracy().update(["A"], [["blue"]])
    assert float(in_batches(ScienceQAAccuracy(), ["B", "A"], [["B. blue"], ["The answer is B."]])) == 0.5


def test_exact_match_takes_any_accepted_answer_and_strips_nothing():
    assert [exact_match(text, ["yes", "yeah"]) for text in ("yes", "yeah", "Yes", "yes ", "")] == [1, 1, 0, 0, 0]
    assert float(in_batches(ExactMatch(), ["yes", "no", ""], [["yes"], ["yes"], [""]])) == pytest.approx(2 / 3)


def test_spearman_of_texts_equals_the_golden_number():
    case = golden("spearman")["text_case"]
    targets = [[target] for target in case["targets"]]
    got = float(in_batches(TextSpearman(), case["predictions"], targets))
    assert got == pytest.approx(case["expected"], abs=1e-12)


def test_spearman_of_useless_texts():
    assert float(text_spearman(["", "", ""], ["1.0", "2.0", "3.0"])) == 0  # constant
    assert float(text_spearman(["nan", "1", "2"], ["0.0", "1.0", "2.0"])) == pytest.approx(1)
    assert math.isnan(float(text_spearman([], [])))


def test_masked_accuracy_equals_the_golden_numbers():
    data = golden("nli_and_entropy")
    logits = torch.tensor(data["logits"], dtype=torch.float64)
    for case in data["cases"]:
        labels, expected = torch.tensor(case["labels"]), case["expected"]
        assert float(accuracy(logits, labels, case["mask_class"])) == pytest.approx(expected["accuracy"], abs=1e-12)
        assert float(accuracy(logits, labels)) == pytest.approx(expected["accuracy_without_mask"], abs=1e-12)
    with pytest.raises(ConfigError, match=r"mask_class=3 of pred \(12, 3\)"):
        accuracy(logits, labels, 3)


def test_acc_and_bwt_equal_the_golden_numbers():
    case, other = golden("benchmark_aggregates")["continual"], golden("continual")
    assert average_accuracy(case["matrix"]) == pytest.approx(case["expected_acc"], abs=1e-9)
    assert backward_transfer(case["matrix"]) == pytest.approx(case["expected_bwt"], abs=1e-9)
    assert average_accuracy(other["matrix"]) == pytest.approx(other["ACC"], abs=1e-9)
    assert backward_transfer(torch.tensor(other["matrix"])) == pytest.approx(other["BWT"], abs=1e-4)  # fp32
    ragged = [row[: t + 1] for t, row in enumerate(case["matrix"])]
    assert backward_transfer(ragged) == backward_transfer(case["matrix"])
    assert math.isnan(backward_transfer([[0.5]]))
    with pytest.raises(ShapeError, match=r"row 1 has 1 scores.*lower triangle"):
        backward_transfer([[1.0], [1.0]])
    with pytest.raises(ShapeError, match="no row"):
        average_accuracy([])


def test_empty_answers_are_counted():
    assert int(in_batches(EmptyAnswers(), ["", "a", " \n", "."], [["x"]] * 4)) == 2


@pytest.mark.parametrize("metric", [ANLS, ExactMatch, VQAAccuracy, TextSpearman])
def test_bad_pairs_are_named(metric):
    with pytest.raises(ShapeError, match="1 predictions of type list for 2 targets"):
        metric().update(["a"], [["a"], ["b"]])
    with pytest.raises(ShapeError, match="of type str"):
        metric().update("a", [["a"]])
    with pytest.raises(DataError, match=r"sample 1 has \[\] as target; expected a list of at least one text"):
        metric().update(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="sample 0 has 'a' as target"):
        metric().update(["a"], ["a"])
