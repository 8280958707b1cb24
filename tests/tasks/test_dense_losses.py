"""Losses of the dense tasks against numbers made by hand, and against themselves with ignored pixels changed."""

import math

import pytest
import torch
from torch import nn

from nscmerge.errors import ConfigError
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges, edge_loss
from tasks.normals import SurfaceNormals, TaskonomyNormals
from tasks.saliency import Saliency, saliency_loss
from tasks.segmentation import Segmentation

SIZE = {"width": 4, "depth": 4}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_segmentation_is_the_mean_over_labelled_pixels():
    logits = torch.tensor([[0.0, math.log(3.0), 5.0], [0.0, 0.0, 5.0]]).reshape(1, 2, 1, 3)
    target = torch.tensor([[[0, 1, 255]]])
    # probabilities of the labels: 1/2, and 1/4
    assert float(Segmentation(2, **SIZE).loss(logits, target)) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_saliency_weights_by_the_other_class_and_divides_by_pixels():
    logits = torch.zeros(1, 2, 1, 5)
    logits[0, 1, 0, 0] = math.log(3.0)  # foreground pixel with probability 3/4
    target = torch.tensor([[[1, 0, 0, 0, 255]]])
    # w = 3/4: foreground weighs 3/4, background 1/4; four valid pixels
    expected = (0.75 * math.log(4 / 3) + 3 * 0.25 * math.log(2)) / 4
    assert float(Saliency(**SIZE).loss(logits, target)) == pytest.approx(expected, rel=1e-6)


def test_saliency_weights_are_the_batch_s():
    logits, target = drawn(3, 2, 4, 4), torch.randint(0, 2, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    w = float((target == 0).double().mean())
    each = nn.functional.cross_entropy(logits, target, reduction="none")
    expected = (each * torch.where(target == 1, w, 1 - w)).mean()
    torch.testing.assert_close(saliency_loss(logits, target), expected)


def test_depth_is_the_mean_absolute_error_in_metres():
    loss = Depth(**SIZE).loss(torch.tensor([[[1.0, -2.0, 9.0]]]), torch.tensor([[[1.5, 1.0, 255.0]]]))
    assert float(loss) == pytest.approx((0.5 + 3.0) / 2)


def test_normals_are_summed_over_channels_and_averaged_over_whole_pixels():
    task = SurfaceNormals(**SIZE)
    target = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 255.0]]).T.reshape(1, 3, 1, 2)  # the second lacks a channel
    prediction = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert float(task.loss(prediction, target)) == pytest.approx(0.6 + 0.2)


def test_normals_are_made_unit_vectors():
    task = SurfaceNormals(**SIZE)
    out = task.predict(drawn(2, 16, 3, 3).float(), {"x": torch.zeros(2, 3, 12, 12)})
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2, 12, 12))


def test_edges_by_hand():
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.0, 255.0]]])
    expected = (0.95 * math.log(2) + 0.05 * math.log(1 + math.exp(2))) / 2
    assert float(edge_loss(logits, target)) == pytest.approx(expected, rel=1e-6)
    both = torch.stack([target, torch.ones_like(target)], dim=1)  # the second channel is for ods-F
    assert float(Edges(**SIZE).loss(logits, both)) == pytest.approx(expected, rel=1e-6)
    assert float(Edges(weight=0.8, **SIZE).loss(logits, both)) != pytest.approx(expected, rel=1e-2)


def test_edges_stay_finite_at_extreme_logits():
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    loss = edge_loss(logits, torch.tensor([[[0.0, 1.0]]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.05 * 200 + 0.95 * 200) / 2)
    assert torch.isfinite(logits.grad).all()


def test_regression_takes_all_pixels_and_no_validity():
    prediction, target = drawn(2, 1, 3, 3), drawn(2, 1, 3, 3, seed=1)
    with_validity = torch.cat([target, torch.zeros_like(target)], dim=1)
    expected = (prediction - target).abs().mean()
    torch.testing.assert_close(DenseRegression(1, masked=True, **SIZE).loss(prediction, with_validity), expected)
    torch.testing.assert_close(DenseRegression(1, **SIZE).loss(prediction, target), expected)
    squared = DenseRegression(2, error="mse", **SIZE)
    a, b = drawn(2, 2, 3, 3), drawn(2, 2, 3, 3, seed=1)
    torch.testing.assert_close(squared.loss(a, b), (a - b).square().mean())
    assert (squared.primary, squared.higher_is_better) == ("rmse", False)


def test_the_three_losses_of_taskonomy_s_normals():
    a, b = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    l1 = TaskonomyNormals(**SIZE).loss(a, b)
    torch.testing.assert_close(l1, (a - b).abs().mean())
    channel = TaskonomyNormals("cosine_channel", **SIZE).loss(a, b)
    torch.testing.assert_close(channel, 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
    width = TaskonomyNormals("sel_width_bug", **SIZE).loss(a, b)
    torch.testing.assert_close(width, 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


MAPS = {
    "semseg": (Segmentation(5, **SIZE), (2, 5, 4, 4), torch.randint(0, 5, (2, 4, 4))),
    "saliency": (Saliency(**SIZE), (2, 2, 4, 4), torch.randint(0, 2, (2, 4, 4))),
    "depth": (Depth(**SIZE), (2, 4, 4), torch.rand(2, 4, 4)),
    "normals": (SurfaceNormals(**SIZE), (2, 3, 4, 4), nn.functional.normalize(torch.randn(2, 3, 4, 4), dim=1)),
    "edges": (Edges(**SIZE), (2, 4, 4), torch.randint(0, 2, (2, 2, 4, 4)).float()),
}


@pytest.mark.parametrize("name", MAPS)
def test_what_lies_under_ignored_pixels_changes_nothing(name):
    task, shape, target = MAPS[name]
    target = target.clone()
    target[..., :2] = 255
    prediction = drawn(*shape).float().requires_grad_()
    loss = task.loss(prediction, target)
    loss.backward()
    other = prediction.detach().clone()
    other[..., :2] += 100 * drawn(*other[..., :2].shape, seed=3).float()
    assert torch.equal(task.loss(other, target), loss)
    assert not prediction.grad[..., :2].any()
    assert prediction.grad[..., 2:].any()


@pytest.mark.parametrize("name", MAPS)
def test_a_batch_without_a_valid_pixel_costs_nothing(name):
    task, shape, target = MAPS[name]
    prediction = drawn(*shape).float().requires_grad_()
    loss = task.loss(prediction, torch.full_like(target, 255))
    loss.backward()
    assert float(loss) == 0
    assert not prediction.grad.any()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="depth is 6"):
        Segmentation(3, width=4, depth=6)
    with pytest.raises(ConfigError, match="error is 'l2'"):
        DenseRegression(1, error="l2", **SIZE)
    with pytest.raises(ConfigError, match="masked True"):
        DenseRegression(1, error="mse", masked=True, **SIZE)
