"""The decoder: where it reads, what comes out, and what all tasks share."""

import pytest
import torch
from torch import nn

from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError, ShapeError
from tasks.classification import TextClassification
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges
from tasks.normals import SurfaceNormals, TaskonomyNormals
from tasks.saliency import Saliency
from tasks.segmentation import Segmentation
from tests.fakes.vit import DEPTH, PATCH, WIDTH, tiny_vit, write_tiny_vit

SIZE = {"width": WIDTH, "depth": DEPTH}
TASKS = {
    "semseg": (Segmentation(7, **SIZE), (7, 12, 20)),
    "saliency": (Saliency(**SIZE), (2, 12, 20)),
    "depth": (Depth(**SIZE), (12, 20)),
    "normals": (SurfaceNormals(**SIZE), (3, 12, 20)),
    "edges": (Edges(**SIZE), (12, 20)),
    "curvature": (DenseRegression(2, error="mse", **SIZE), (2, 12, 20)),
    "tax_n": (TaskonomyNormals(**SIZE), (3, 12, 20)),
}


def images(n=2, shape=(12, 20), seed=0):
    return {"x": torch.randn(n, 3, *shape, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_base_model(f"timm:{write_tiny_vit(tmp_path_factory.mktemp('base') / 'vit')}")


@pytest.mark.parametrize("name", TASKS)
def test_predictions_have_the_image_s_size(model, name):
    task, shape = TASKS[name]
    assert task(model, images()).shape == (2, *shape)


def test_features_are_the_tokens_of_four_depths(model):
    inputs, seen = images(), []
    hooks = [b.register_forward_hook(lambda m, a, out: seen.append(out)) for b in model.blocks[:3]]
    hooks.append(model.norm.register_forward_hook(lambda m, a, out: seen.append(out)))
    features = TASKS["depth"][0].features(model, inputs)
    for hook in hooks:
        hook.remove()
    assert features.shape == (2, 4 * WIDTH, 3, 5)
    for part, tokens in zip(features.chunk(4, dim=1), seen, strict=True):
        # token 1 + 5 row + column; token 0 is the class token
        assert torch.equal(part[:, :, 2, 1], tokens[:, 1 + 5 * 2 + 1])
        assert torch.equal(part.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_a_twelve_block_model_is_read_after_blocks_3_6_9_and_the_norm():
    calls = {}

    class Twelve(nn.Module):
        embed_dim, blocks = 2, range(12)
        patch_embed = type("Embed", (), {"patch_size": (16, 16)})

        def forward_intermediates(self, x, indices, output_fmt):
            calls.update(indices=indices, output_fmt=output_fmt)
            return torch.zeros(1, 1008 + 1, 2), [torch.zeros(1, 1008, 2)] * 3

    features = Depth(width=2).features(Twelve(), {"x": torch.zeros(1, 3, 448, 576)})
    assert calls == {"indices": [2, 5, 8], "output_fmt": "NLC"}  # from 0
    assert features.shape == (1, 8, 28, 36)


def test_the_decoder_is_a_1x1_convolution_and_bilinear_upsampling(model):
    task, inputs = TASKS["curvature"][0], images()
    features = task.features(model, inputs)
    small = torch.einsum("nchw,oc->nohw", features, task.decoder.weight[:, :, 0, 0]) + task.decoder.bias[:, None, None]
    expected = nn.functional.interpolate(small, scale_factor=PATCH, mode="bilinear", align_corners=False)
    torch.testing.assert_close(task(model, inputs), expected)


def test_all_dense_tasks_share_their_features(model):
    inputs = images()
    assert len({task.reads() for task, _ in TASKS.values()}) == 1
    first, *rest = (task.features(model, inputs) for task, _ in TASKS.values())
    assert all(torch.equal(first, other) for other in rest)
    assert Depth(width=8, depth=DEPTH).reads() != Depth(**SIZE).reads() != TextClassification(2).reads()


def test_a_task_can_be_written_down_and_built_again():
    for task, _ in TASKS.values():
        config = task.config()
        assert config["init_args"]["width"] == WIDTH
        again = type(task)(**config["init_args"])
        again.load_head(task.state_dict(), "again")
        assert again.config() == config


def test_a_model_of_another_width_is_named(model):
    with pytest.raises(ConfigError, match=r"Depth expects .* width 768 and depth 12; VisionTransformer has width 16"):
        Depth().check(model)
    with pytest.raises(ConfigError, match="has width None and depth 0"):
        Depth().check(nn.Linear(2, 2))


def test_sizes_that_patches_do_not_divide_are_refused(model):
    with pytest.raises(ShapeError, match=r"\(13, 20\) pixels do not divide into patches of \(4, 4\)"):
        TASKS["depth"][0](model, images(shape=(13, 20)))


def test_features_do_not_depend_on_the_batch(model):
    inputs, task = images(4), TASKS["depth"][0]
    whole = task.features(model, inputs)
    torch.testing.assert_close(task.features(model, {"x": inputs["x"][1:2]}), whole[1:2], atol=1e-5, rtol=1e-5)
    assert tiny_vit().blocks[0].attn.qkv.out_features == 3 * WIDTH
