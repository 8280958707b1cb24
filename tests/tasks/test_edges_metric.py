"""ods-F: counts by hand, what the score must do, many images."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from nscmerge.errors import ConfigError, NSCMergeError, OutputError, ShapeError
from tasks.edge_matching.counting import count_image
from tasks.edge_matching.protocol import Protocol
from tasks.edge_matching.thinning import thin
from tasks.edge_matching.workers import EdgeCounter
from tasks.edges import Edges
from tasks.metrics import OdsF, edge_scores, ods_f
from tasks.metrics.ods_f import quantise
from tests.fakes.edge_maps import die, outline, ridges


def test_counts_by_hand():
    # Distance 1.06 px: neighbours in the four directions match, those across a corner do not.
    strength = np.array([[0, 0.9, 0], [0, 0.5, 0], [0, 0, 0.9]])
    edges = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]], bool)
    protocol = Protocol.of(0.25, [0.3, 0.6, 0.95], nms=False)
    levels = quantise(strength)
    assert levels.tolist() == [[0, 229, 0], [0, 127, 0], [0, 0, 229]]
    assert count_image(levels, edges, protocol).tolist() == [[2, 2, 3], [2, 2, 2], [0, 2, 0]]
    other = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    result = edge_scores([strength, 0 * strength], [edges, other], 0.25, [0.3, 0.6, 0.95], nms=False)
    assert result.table[:, 0].tolist() == [0.3, 0.6, 0.95]
    np.testing.assert_allclose(result.table[:, 1:], [[2 / 3, 2 / 3, 2 / 3], [2 / 3, 1, 0.8], [0, 0, 0]])
    assert (result.ods_f, result.threshold, result.ois_f) == pytest.approx((0.8, 0.6, 0.8))
    # Recalls 0 to 0.66 lie between (R 0, P 0) and (2/3, 1).
    levels = np.arange(67) / 100
    assert result.average_precision == pytest.approx((levels / (2 / 3)).sum() / 101)


def test_every_image_may_have_its_own_threshold():
    edges = outline(40, 10, 30)
    faint, strong = 0.3 * edges, 0.9 * edges
    strong[5:36, 35] = 0.5  # a false edge that only a high threshold removes
    result = edge_scores([faint, strong], [edges, edges], 0.01, 19)
    assert result.ois_f == 1 > result.ods_f > 0.5


@pytest.mark.parametrize("nms", [True, False])
def test_a_boundary_matches_itself(nms):
    result = edge_scores([outline().astype(float)], [outline()], 0.0075, nms=nms)
    assert result.ods_f == result.ois_f == 1
    assert len(result.table) == 101


def test_a_shift_within_the_distance_is_free_beyond_it_is_not():
    edges = outline()  # diagonal 141 px: 0.02 is 2.8 px
    assert ods_f([np.roll(edges, 2, 1).astype(float)], [edges], 0.02, 19) == 1
    assert ods_f([np.roll(edges, (2, 2), (0, 1)).astype(float)], [edges], 0.02, 19) == pytest.approx(1, abs=0.05)
    assert ods_f([np.roll(edges, (7, 7), (0, 1)).astype(float)], [edges], 0.02, 19) < 0.2


def test_a_blank_map_scores_zero():
    edges = outline()
    for blank in (np.zeros((100, 100)), np.full((100, 100), np.nan)):
        result = edge_scores([blank], [edges], 0.0075, 19)
        assert result.ods_f == result.ois_f == result.average_precision == 0
        assert np.isfinite(result.table).all()
    assert ods_f([edges.astype(float)], [0 * edges], 0.0075, 19) == 0
    assert ods_f([], [], 0.0075) == 0


def test_eight_bit_maps_survive_the_way_through_floats():
    levels = np.arange(256, dtype=np.uint8)
    for values in (levels, levels / 255, (levels / 255).astype(np.float32), torch.from_numpy(levels) / 255):
        assert np.array_equal(quantise(values), levels)
    assert quantise(torch.tensor([0.999, 1.0, math.nan])).tolist() == [254, 255, 0]
    assert quantise(torch.tensor([0.25, 0.5, 1.0], dtype=torch.bfloat16)).tolist() == [63, 127, 255]
    assert quantise(np.array([False, True])).tolist() == quantise(torch.tensor([0, 1])).tolist() == [0, 255]


def test_protocols():
    assert [len(Protocol.of(0.01, n).thresholds) for n in (101, 99, 19)] == [101, 99, 19]
    assert Protocol.of(0.01).thresholds[:3] == (0.001, 0.01, 0.02)
    assert Protocol.of(0.01).thresholds[-2:] == (0.99, 0.999)
    assert Protocol.of(0.0075).radius((425, 560)) == pytest.approx(5.27, abs=0.01)
    for options, message in (
        ((0.01, 20), r"thresholds is 20; expected one of \[19, 99, 101\]"),
        ((0.01, [0.5, 0.2]), "that ascend"),
        ((0.01, []), "that ascend"),
        ((0, 19), "max_dist is 0"),
        ((math.nan, 19), "max_dist is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            Protocol.of(*options)


def batch(rng):
    """Two images of different size in one padded batch, and the same as lists."""
    logits, targets, lists = torch.randn(2, 30, 44), torch.full((2, 2, 30, 44), 255.0), ([], [])
    for i, (top, left, height, width) in enumerate([(1, 2, 28, 40), (0, 0, 30, 33)]):
        window = slice(top, top + height), slice(left, left + width)
        strength = torch.tensor(ridges(rng, (height, width)), dtype=torch.float32)
        edges = torch.tensor(thin(ridges(rng, (height, width)) > 0.6))
        logits[i][window] = torch.logit(strength.clamp(0.001, 0.999))
        targets[i, 1][window] = edges.float()
        lists[0].append(logits[i][window].sigmoid())
        lists[1].append(edges)
    return logits, targets, lists


def test_the_class_cuts_off_padding_and_equals_the_function():
    logits, targets, lists = batch(np.random.default_rng(5))
    metric = OdsF(0.03, 19)
    for i in range(2):
        metric.update(logits[i : i + 1], targets[i : i + 1])
    expected = edge_scores(*lists, 0.03, 19)
    assert float(metric.compute()) == expected.ods_f > 0.3
    assert metric.scores().ois_f == expected.ois_f >= expected.ods_f
    np.testing.assert_array_equal(metric.scores().table, expected.table)


def test_a_task_reports_all_three_scores_and_counts_once(monkeypatch):
    logits, targets, lists = batch(np.random.default_rng(5))
    counted = []
    original = EdgeCounter.count

    def count(self, images):
        counted.append(len(images))
        return original(self, images)

    monkeypatch.setattr(EdgeCounter, "count", count)
    metrics = Edges(max_dist=0.03, thresholds=19, width=4, depth=4).metrics()
    for _ in range(2):  # a second test starts anew
        for i in range(2):
            metrics.update(logits[i : i + 1], targets[i : i + 1])
        found = {name: float(value) for name, value in metrics.compute().items()}
        metrics.reset()
        expected = edge_scores(*lists, 0.03, 19)
        got = found["odsF"], found["oisF"], found["AP"]
        assert got == (expected.ods_f, expected.ois_f, expected.average_precision)
    assert counted == [1, 1, 2] * 2  # image by image, and at once by the function


def test_metrics_of_one_task_share_their_workers():
    task = Edges(max_dist=0.03, thresholds=19, workers=1, width=4, depth=4)
    logits, targets, lists = batch(np.random.default_rng(5))
    first, second = task.metrics(), task.metrics()
    pools = []
    for metrics in (first, second):
        metrics.update(logits, targets)
        pools.append(metrics["odsF"]._counting._pool)
    assert pools[0] is pools[1] is not None
    expected = edge_scores(*lists, 0.03, 19).ods_f
    assert [float(m.compute()["odsF"]) for m in (first, second)] == [expected, expected]
    assert first["odsF"]._counting._pool is None


def test_errors_of_the_class():
    logits, targets, _ = batch(np.random.default_rng(5))
    with pytest.raises(ConfigError, match="255 everywhere in channel 1"):
        OdsF(0.03, 19).update(logits, torch.full_like(targets, 255))
    targets[0, 1, 10, 10] = 255
    with pytest.raises(ConfigError, match="255 inside the image"):
        OdsF(0.03, 19).update(logits, targets)
    with pytest.raises(ShapeError, match=r"\(2, 30, 44\), target \(2, 30, 44\)"):
        OdsF(0.03, 19).update(logits, targets[:, 0])
    with pytest.raises(ShapeError, match=r"edge map is \(3, 3\), boundary \(2, 3\)"):
        ods_f([np.zeros((3, 3))], [np.zeros((2, 3))], 0.01)
    with pytest.raises(ConfigError, match="workers is -1"):
        ods_f([], [], 0.01, workers=-1)


def test_workers_count_the_same():
    logits, targets, lists = batch(np.random.default_rng(6))
    metric = OdsF(0.03, 19, workers=1)
    metric.update(logits, targets)
    copied = copy.deepcopy(metric)  # as a collection does, while the workers are there
    pickle.dumps(metric)
    assert float(metric.compute()) == float(copied.compute()) == ods_f(*lists, 0.03, 19)
    metric.update(logits, targets)  # starts them again
    assert float(metric.compute()) == float(copied.compute())


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    _, _, lists = batch(np.random.default_rng(7))
    expected = ods_f(*lists, 0.03, 19)
    first = [part[:1] for part in lists]
    ods_f(*first, 0.03, 19, cache=tmp_path / "counts")
    (kept,) = (tmp_path / "counts").iterdir()
    counted = []
    monkeypatch.setattr(
        "tasks.edge_matching.workers.count_image", lambda *image: counted.append(image) or count_image(*image)
    )
    assert ods_f(*lists, 0.03, 19, cache=tmp_path / "counts") == expected
    assert len(counted) == 1
    assert ods_f(*lists, 0.03, 19, cache=tmp_path / "counts") == expected
    assert len(counted) == 1
    kept.write_bytes(kept.read_bytes()[:100])  # a damaged file is counted again
    assert ods_f(*lists, 0.03, 19, cache=tmp_path / "counts") == expected
    assert len(counted) == 2
    ods_f(*lists, 0.04, 19, cache=tmp_path / "counts")  # another protocol
    assert len(counted) == 4
    assert not [file for file in (tmp_path / "counts").iterdir() if file.suffix != ".npy"]


def test_a_worker_that_dies_is_named(monkeypatch):
    monkeypatch.setattr("tasks.edge_matching.workers.count_image", die)
    with pytest.raises(NSCMergeError, match="a process that counts edges died"):
        ods_f([np.ones((3, 3))], [np.ones((3, 3))], 0.01, workers=1)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    counter = EdgeCounter(Protocol.of(0.01, 19), cache=tmp_path / "file")
    with pytest.raises(OutputError, match="cannot keep edge counts"):
        list(counter.count([(np.zeros((3, 3), np.uint8), np.zeros((3, 3), bool))]))
