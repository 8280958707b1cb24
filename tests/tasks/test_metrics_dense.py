"""Metrics of dense tasks: golden numbers, numbers by hand, what must not count."""

import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from nscmerge.errors import ConfigError, ShapeError
from tasks.metrics import (
    L1,
    RMSE,
    EdgeReferenceLoss,
    MeanAngularError,
    MeanIoU,
    SaliencyMaxF,
    SaliencyMIoU,
    edge_reference_loss,
    l1,
    mean_angular_error,
    mean_iou,
    mse,
    ods_f,
    saliency_max_f,
    saliency_max_f_double_sigmoid,
    saliency_miou,
)
from tests.fakes.metric_cases import cases

ROOT = Path(__file__).parents[2]
CASES = cases()
IGNORING = [name for name, case in CASES.items() if case.ignored is not None]


def golden(name):
    return json.loads((ROOT / "tests" / "golden" / f"metric_{name}.json").read_text())["cases"]


def computed(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return float(metric.compute())


@pytest.mark.parametrize("case", golden("miou_ignore"), ids=lambda case: case["name"])
def test_miou_equals_the_golden_numbers(case):
    pred, target, classes = torch.tensor(case["pred"]), torch.tensor(case["target"]), case["num_classes"]
    expected = case["expected"]
    present = math.nan if expected["miou_over_present"] is None else 100 * expected["miou_over_present"]
    for skip, value in ((False, 100 * expected["miou_absent_counts_zero"]), (True, present)):
        assert float(mean_iou(pred, target, classes, skip_absent=skip)) == pytest.approx(value, abs=1e-10, nan_ok=True)
        images = [(p[None], t[None]) for p, t in zip(pred, target, strict=True)]
        metric = MeanIoU(classes, skip_absent=skip)
        assert computed(metric, *images) == pytest.approx(value, abs=1e-10, nan_ok=True)
        assert metric.counts.tolist() == expected["confusion_rows_gt"]


def test_miou_takes_the_largest_logit_and_names_a_wrong_class():
    pred, target = torch.tensor([[[0, 2]]]), torch.tensor([[[0, 1]]])
    logits = torch.nn.functional.one_hot(pred, 3).movedim(-1, 1).float() - 5
    assert computed(MeanIoU(3), (logits, target)) == computed(MeanIoU(3), (pred, target)) == pytest.approx(100 / 3)
    with pytest.raises(ConfigError, match="target has class 3; expected 0 to 2"):
        mean_iou(pred, torch.tensor([[[0, 3]]]), 3)
    with pytest.raises(ConfigError, match="prediction has class -1"):
        mean_iou(pred - 1, target, 3)
    with pytest.raises(ShapeError, match=r"\(1, 1, 2\), target \(1, 2\)"):
        mean_iou(pred, target[0], 3)


@pytest.mark.parametrize("case", golden("mean_angular_error"), ids=lambda case: case["name"])
def test_angles_equal_the_golden_numbers(case):
    pred, target = (torch.tensor(case[k], dtype=torch.float64).movedim(-1, 1) for k in ("pred", "target"))
    mask, expected = torch.tensor(case["mask"]), case["expected"]["mean_deg_pooled"]
    assert float(mean_angular_error(pred, target, mask)) == pytest.approx(expected, abs=1e-5)
    target = target.masked_fill(~mask[:, None], 255)
    images = [(p[None], t[None]) for p, t in zip(pred, target, strict=True)]
    assert computed(MeanAngularError(), *images) == pytest.approx(expected, abs=1e-5)


def test_small_angles_zero_vectors_and_no_pixels():
    angle = math.radians(1e-6)
    pred = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    target = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    assert float(mean_angular_error(pred, target)) == pytest.approx(1e-6, rel=1e-9)
    assert float(mean_angular_error(0 * pred, target)) == pytest.approx(90)
    assert math.isnan(float(mean_angular_error(pred, target, torch.zeros(1, 1, 1, dtype=torch.bool))))
    assert math.isnan(computed(MeanAngularError(), (pred, torch.full_like(target, 255))))
    with pytest.raises(ShapeError, match=r"expected \(N, 3, H, W\) twice"):
        mean_angular_error(pred[:, :2], target)
    with pytest.raises(ShapeError, match="expected a mask"):
        mean_angular_error(pred, target, torch.ones(1, 3, 1, 1))


def test_l1_by_hand():
    pred = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 5.0]]]])  # (2, 1, 1, 2)
    target = torch.tensor([[[[0.0, 0.0]], [[1.0, 0.0]]], [[[3.0, 1.0]], [[1.0, 1.0]]]])  # values, validity
    assert computed(L1(), (pred, target)) == (1 + 2 + 0 + 4) / 4
    assert computed(L1(mask_channel=True), (pred, target)) == (1 + 0 + 4) / 3
    assert computed(L1(), (pred[:, 0], target)) == computed(L1(), (pred, target[:, :1])) == 7 / 4
    assert float(l1(pred, target[:, :1])) == 7 / 4
    with pytest.raises(ShapeError, match="one channel more"):
        L1(mask_channel=True).update(pred, target[:, :1])
    with pytest.raises(ShapeError, match="all must agree"):
        L1().update(pred, target[:, :, :, :1])


def test_curvature_pools_both_channels():
    pred, target = torch.tensor([[[[3.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[4.0]]]])
    assert computed(RMSE(), (pred, target)) == pytest.approx(math.sqrt(12.5))
    assert float(mse(pred, target)) == 12.5


def test_masked_and_unmasked_stay_apart_in_a_collection():
    # The first batch has no hole, so both have counted the same when the collection looks for twins.
    pred, full = torch.ones(1, 1, 1, 2), torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
    holed = torch.tensor([[[[0.0, 5.0]], [[1.0, 0.0]]]])
    both = MetricCollection({"l1": L1(), "l1_masked": L1(mask_channel=True)})
    both.update(pred, full)
    both.update(pred, holed)
    assert {k: float(v) for k, v in both.compute().items()} == {"l1": (1 + 1 + 1 + 4) / 4, "l1_masked": 1}


def brute_saliency(probabilities, masks):
    """Both scores as the formulas have them, threshold by threshold, in NumPy."""
    jaccard, f = [], []
    for t in np.linspace(0.2, 0.9, 15):
        values = []
        for p, m in zip(probabilities, masks, strict=True):
            a, b = p[m != 255] > t, m[m != 255] == 1
            values.append(1.0 if not (a | b).any() else (a & b).sum() / (a | b).sum())
        jaccard.append(np.mean(values))
    for t in np.arange(1, 20) * 0.05:
        a = np.concatenate([p[m != 255] >= t for p, m in zip(probabilities, masks, strict=True)])
        b = np.concatenate([m[m != 255] == 1 for m in masks])
        tp = (a & b).sum()
        precision, recall = tp / max(a.sum(), 1), tp / max(b.sum(), 1)
        f.append(1.3 * precision * recall / (0.3 * precision + recall) if tp else 0.0)
    return max(jaccard), max(f)


def test_saliency_equals_the_formulas():
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 255], size, p=[0.6, 0.3, 0.1]) for size in ((9, 7), (5, 12), (6, 6))]
    masks[2][masks[2] == 1] = 0  # nothing salient
    maps = [np.clip(0.4 * (m == 1) + rng.random(m.shape) * 0.7, 0, 1) for m in masks]
    expected = brute_saliency(maps, masks)
    tensors = [torch.tensor(p) for p in maps], [torch.tensor(m) for m in masks]
    assert (float(saliency_miou(*tensors)), float(saliency_max_f(*tensors))) == pytest.approx(expected, abs=1e-12)
    batches = []
    for p, m in zip(*tensors, strict=True):
        logit = torch.logit(p.clamp(1e-9, 1 - 1e-9))
        batches.append((torch.stack([torch.zeros_like(logit), logit])[None], m[None]))
    got = computed(SaliencyMIoU(), *batches), computed(SaliencyMaxF(), *batches)
    assert got == pytest.approx(expected, abs=1e-12)


def test_saliency_of_constant_maps():
    mask = torch.zeros(10, 20, dtype=torch.int64)
    mask.view(-1)[:37] = 1  # a share of 0.185, about that of PASCAL-Context
    everything, nothing = torch.ones(10, 20), torch.zeros(10, 20)
    assert float(saliency_max_f([everything], [mask])) == pytest.approx(1.3 * 0.185 / (0.3 * 0.185 + 1), abs=1e-12)
    assert float(saliency_max_f([everything], [mask])) == pytest.approx(0.228, abs=5e-4)
    assert float(saliency_max_f([nothing], [mask])) == 0
    assert float(saliency_miou([nothing, everything], [mask, mask])) == pytest.approx(0.0925)
    assert float(saliency_miou([nothing], [0 * mask])) == 1  # both empty
    assert float(saliency_max_f([nothing], [0 * mask])) == 0
    assert float(saliency_max_f([everything.bool() * torch.nan], [mask])) == 0
    assert math.isnan(float(saliency_miou([], [])))
    with pytest.raises(ShapeError, match=r"expected \(H, W\) twice"):
        saliency_max_f([everything], [mask[:5]])
    with pytest.raises(ShapeError, match="background and salient"):
        SaliencyMIoU().update(everything[None], mask[None])


def test_a_threshold_itself_counts_for_f_and_not_for_jaccard():
    half, mask = torch.full((1, 2), 0.5), torch.tensor([[1, 0]])
    # At 0.5 itself all is foreground for F, P = 0.5 and R = 1; the Jaccard index at 0.2 itself has an empty region.
    assert float(saliency_max_f([half], [mask])) == pytest.approx(1.3 * 0.5 / 1.15)
    assert float(saliency_max_f([torch.tensor([[0.5, 0.45]])], [mask])) == pytest.approx(1)
    assert float(saliency_miou([torch.tensor([[0.2, 0.2]])], [mask])) == 0


def test_the_second_sigmoid_leaves_four_thresholds():
    mask = torch.tensor([[1, 1, 1, 0]])
    # 0.21 passes 0.55 (at 0.2007), 0.20 passes none, so at 0.55 the first three are found and nothing else.
    assert float(saliency_max_f_double_sigmoid([torch.tensor([[0.9, 0.5, 0.21, 0.20]])], [mask])) == pytest.approx(1)
    assert float(saliency_max_f_double_sigmoid([torch.tensor([[0.9, 0.5, 0.19, 0.20]])], [mask])) < 1


def test_reference_loss_of_the_blank_map():
    target = torch.zeros(1, 10, 10)
    target[0, 0, :7] = 1
    density = 0.07
    blank = float(edge_reference_loss(torch.zeros(1, 10, 10), target))
    assert blank == pytest.approx(math.log(2) * (0.05 + 0.9 * density))
    assert blank == pytest.approx(0.0347 + 0.624 * density, abs=1e-4)
    # x = sigmoid(0) = 0.5 is used again as a logit.
    half = 0.95 * density * math.log1p(math.exp(-0.5)) + 0.05 * (1 - density) * math.log1p(math.exp(0.5))
    assert computed(EdgeReferenceLoss(), (torch.zeros(1, 10, 10), torch.stack([target, target], 1))) == pytest.approx(
        half
    )
    assert math.isnan(float(edge_reference_loss(target, torch.full_like(target, 255))))
    with pytest.raises(ShapeError, match="both must agree"):
        edge_reference_loss(target, target[0])


@pytest.mark.parametrize("rubbish", [math.nan, 1e4, -1e4])
@pytest.mark.parametrize("name", IGNORING)
def test_ignored_pixels_do_not_count(name, rubbish):
    case = CASES[name]
    where = case.ignored if case.prediction.ndim == 3 else case.ignored[:, None]
    spoilt = case.prediction.masked_fill(where, rubbish)
    assert case.ignored.any()
    assert computed(case.metric(), (spoilt, case.target)) == computed(case.metric(), (case.prediction, case.target))


@pytest.mark.parametrize("name", IGNORING)
def test_padding_does_not_count(name):
    case = CASES[name]
    padded = []
    for tensor, value in ((case.prediction, 0.7), (case.target, 0 if name == "l1_masked" else 255)):
        padded.append(torch.nn.functional.pad(tensor, (2, 3, 4, 1), value=value))
    assert computed(case.metric(), padded) == pytest.approx(
        computed(case.metric(), (case.prediction, case.target)), rel=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_batches_do_not_matter(name):
    case = CASES[name]
    whole = computed(case.metric(), (case.prediction, case.target))
    images = [(case.prediction[i : i + 1], case.target[i : i + 1]) for i in (3, 1, 4, 0, 2)]
    assert computed(case.metric(), *images) == pytest.approx(whole, rel=1e-12)
    assert math.isfinite(whole)


def test_metrics_come_up_without_the_extra_and_say_what_is_missing(monkeypatch):
    for file in (ROOT / "tasks" / "metrics").glob("*.py"):
        for node in ast.parse(file.read_text()).body:  # what runs on import
            name = node.module if isinstance(node, ast.ImportFrom) else ""
            assert not str(name).startswith(("scipy", "skimage"))
            assert not str(name).startswith("tasks.edge_matching") or name == "tasks.edge_matching.protocol"
    for name in ("workers", "counting", "suppression", "matching"):
        monkeypatch.delitem(sys.modules, f"tasks.edge_matching.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ConfigError, match=r"ods-F needs the package scipy, which is missing.*nscmerge\[dense\]"):
        ods_f([torch.zeros(3, 3)], [torch.zeros(3, 3)], 0.01)
