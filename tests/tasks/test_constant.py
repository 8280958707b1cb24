"""The constant that an expert has to beat: the best one there is, by the task's own metric."""

import json

import pytest
import torch
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge.errors import ConfigError
from tasks.constant import compare, constant_scores, constants, main
from tasks.dense import DenseTask
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges
from tasks.normals import SurfaceNormals, TaskonomyNormals
from tasks.saliency import Saliency
from tasks.segmentation import Segmentation
from tests.fakes.vit import FakeImageDataModule

SIZE = {"width": 4, "depth": 4}


def test_majority_class():
    targets = torch.tensor([[[0, 2, 2, 255, 255, 255]]])
    assert constants(Segmentation(3, **SIZE), targets).argmax(1).tolist() == [2]


def test_depth_takes_mean_and_median_of_what_was_measured():
    targets = torch.tensor([[[1.0, 2.0, 6.0, 255.0]]])
    assert constants(Depth(**SIZE), targets).tolist() == [[3.0], [2.0]]


def test_regression_takes_medians_per_channel_without_validity():
    targets = torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 1.0]]).reshape(1, 2, 1, 3)
    assert constants(DenseRegression(1, masked=True, **SIZE), targets).tolist() == [[2.0]]
    assert constants(DenseRegression(2, **SIZE), targets).tolist() == [[2.0, 0.0]]
    mean = constants(DenseRegression(2, error="mse", **SIZE), targets)
    torch.testing.assert_close(mean, torch.tensor([[4.0, 1 / 3]]))
    assert constants(TaskonomyNormals(**SIZE), targets.expand(1, 2, 1, 3)[:, [0, 1, 1]]).shape == (1, 3)


def test_normals_leave_out_pixels_without_a_label():
    targets = torch.full((1, 3, 1, 3), 255.0)
    targets[0, :, 0, 0], targets[0, :, 0, 1] = torch.tensor([0.0, 0.6, 0.8]), torch.tensor([0.0, 0.0, 1.0])
    mean, _, axis = constants(SurfaceNormals(**SIZE), targets)
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.3, 0.9]))
    assert axis.tolist() == [0, 0, 1]


def test_edges_are_everywhere_or_nowhere():
    assert constants(Edges(**SIZE), torch.zeros(1, 2, 2, 2)).sign().tolist() == [[1], [-1]]


def test_the_score_is_the_metric_of_a_constant_map():
    data = FakeImageDataModule(lambda x: x[:1].abs(), size=6)
    task = DenseRegression(1, **SIZE)
    train, test = (torch.stack([data.dataset(s).target(i) for i in range(6)]) for s in ("train", "test"))
    expected = float((test - train.median()).abs().mean())
    assert constant_scores(task, data)["L1"] == pytest.approx(expected, rel=1e-6)


def test_the_better_candidate_is_taken():
    data = FakeImageDataModule(lambda x: (x[0] > 1).long(), size=6)
    scores = constant_scores(Saliency(**SIZE), data)  # all background scores 0 wherever an image has foreground
    test = torch.stack([data.dataset("test").target(i) for i in range(6)]).double()
    assert scores["sal_mIoU"] == pytest.approx(float(test.mean((1, 2)).mean()), abs=1e-6)


@pytest.mark.parametrize(("score", "verdict"), [(0.1, True), (9.0, False)])
def test_experts_are_compared_and_losers_are_named(tmp_path, capsys, score, verdict):
    task = Depth(**SIZE)
    card = {"task": task.config(), "scores": {"test": {"rmse": score}}}
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "expert.json").write_text(json.dumps(card))
    joint = JointDataModule({"far": FakeImageDataModule(lambda x: 3 + x[0])})
    assert compare(joint, str(tmp_path)) is verdict
    assert ("NOT BETTER" in capsys.readouterr().out) is not verdict


def test_other_tasks_have_none():
    class Strange(DenseTask):
        primary, higher_is_better = "x", True
        loss = metrics = lambda self, *a: None

    with pytest.raises(ConfigError, match="no constant predictor is known for Strange"):
        constants(Strange(1, **SIZE), nn.Parameter(torch.zeros(1)))


def test_the_command_names_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--experts EXPERTS" in capsys.readouterr().out
