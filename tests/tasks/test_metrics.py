import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from nscmerge.errors import ShapeError
from tasks.metrics import RMSE, accuracy, normalized_score, pearson, rmse, spearman
from tasks.metrics.correlation import average_ranks

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"metric_{name}.json").read_text())


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 50).astype(float)  # many ties
    return x, x + rng.normal(size=50)


def test_spearman_equals_the_golden_numbers():
    case = golden("spearman")
    numeric, text = case["numeric_case"], case["text_case"]
    assert float(spearman(numeric["x"], numeric["y"])) == pytest.approx(numeric["expected"], abs=1e-12)
    targets = [float(t) for t in text["targets"]]
    assert float(spearman(text["parsed_predictions"], targets)) == pytest.approx(text["expected"], abs=1e-12)


def test_correlations_equal_scipy_and_the_class(vectors):
    x, y = vectors
    assert float(spearman(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert float(pearson(x, y)) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert average_ranks(torch.tensor(x)).tolist() == stats.rankdata(x).tolist()
    pair = torch.tensor(y), torch.tensor(x)
    for function, metric in ((pearson, PearsonCorrCoef()), (spearman, SpearmanCorrCoef())):
        for rows in torch.arange(50).split(17):  # fp64 in, the class keeps batches in fp32
            metric.update(pair[0][rows].float(), pair[1][rows].float())
        assert float(metric.compute()) == pytest.approx(float(function(*pair)), abs=1e-5)


def test_a_constant_side_has_no_correlation():
    assert math.isnan(float(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])))
    assert math.isnan(float(spearman([1.0], [1.0])))
    with pytest.raises(ShapeError, match=r"x is \(2,\), y \(3,\)"):
        spearman([1, 2], [1, 2, 3])


def test_rmse_pools_valid_pixels_as_the_golden_number_does():
    (case,) = golden("rmse_mask")["cases"]
    pred, target = (torch.tensor(case[key], dtype=torch.float64) for key in ("pred", "target"))
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    expected = case["expected"]["rmse_pooled"]
    assert float(rmse(pred, target, mask)) == pytest.approx(expected, abs=1e-10)
    target[~mask] = float("nan")  # what is masked may be anything
    metric = RMSE()
    for image in range(len(pred)):
        metric.update(pred[image], target[image], mask[image])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-10)


def test_rmse_without_mask_equals_torchmetrics(vectors):
    x, y = (torch.tensor(v) for v in vectors)
    ours, theirs = RMSE(), MeanSquaredError(squared=False)
    ours.update(x, y)
    theirs.update(x, y)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert math.isnan(float(rmse(x, y, torch.zeros(50, dtype=torch.bool))))
    with pytest.raises(ShapeError, match="all must agree"):
        rmse(x, y[:1])


def test_accuracy_of_classes_and_scores():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    target = torch.tensor([1, 0, 0, 1])
    metric = MulticlassAccuracy(2, average="micro")
    metric.update(scores, target)
    assert float(accuracy(scores, target)) == float(accuracy(scores.argmax(1), target)) == 0.75
    assert float(metric.compute()) == 0.75
    with pytest.raises(ShapeError, match=r"\(4, 2, 1\), target \(3,\)"):
        accuracy(scores[:, :, None], target[:3])


def test_normalized_scores_equal_the_golden_numbers():
    case = golden("benchmark_aggregates")["normalised"]
    rows = zip(case["merged"], case["finetuned"], case["higher_is_better"], strict=True)
    got = [normalized_score(*row) for row in rows]
    assert got == pytest.approx(case["expected_percent"], abs=1e-9)
    assert sum(got) / len(got) == pytest.approx(case["expected_average"], abs=1e-9)


def test_normalized_scores_at_zero():
    assert math.isnan(normalized_score(0.5, 0.0, True))
    assert normalized_score(0.0, 0.5, True) == 0
    assert normalized_score(-0.2, 0.4, True) == -50
    for expert in (math.nan, math.inf):
        assert math.isnan(normalized_score(0.5, expert, True))
        assert math.isnan(normalized_score(0.0, expert, False))


@pytest.mark.parametrize(
    ("merged", "higher"),
    [(0.0, False), (math.nan, False), (math.inf, False), (math.nan, True), (math.inf, True), (-math.inf, True)],
)
def test_a_broken_merge_counts_zero_with_a_warning(merged, higher):
    for expert in (0.5, 0.5 if higher else 0.0):
        with pytest.warns(UserWarning, match=f"a merged score of {merged:g}.*counts as 0 percent"):
            assert normalized_score(merged, expert, higher) == 0
