"""Real size, once, on a CPU: a random ViT-B/16 on two full-size frames per data set, for all twenty tasks."""

import math

import pytest
import timm
import torch

from datamodules.base import collate
from datamodules.synth import SynthNYUDDataModule, SynthPascalDataModule, SynthTaskonomyDataModule
from nscmerge.split_qkv import split_qkv
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges
from tasks.lora import add_lora, lora_layers
from tasks.normals import SurfaceNormals, TaskonomyNormals
from tasks.saliency import Saliency
from tasks.segmentation import Segmentation

LAYERS = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj"]
NYUD = {"train": 2, "held_out": 4, "image_size": (425, 560), "size": (448, 576)}
# Every split needs an image with a person, and two images may have none.
PASCAL = {"train": 4, "val": 4, "test": 4, "image_size": (375, 500), "size": (512, 512)}
TASKONOMY = {"train": 1, "val": 1, "test": 1, "views": 2, "image_size": (512, 512), "size": (256, 256)}
SETS = {
    "nyud": (
        SynthNYUDDataModule,
        NYUD,
        (28, 36),
        {
            "semseg": Segmentation(40),
            "depth": Depth(),
            "normal": SurfaceNormals(),
            "edge": Edges(max_dist=0.011, thresholds=19),
        },
    ),
    "pascal": (
        SynthPascalDataModule,
        PASCAL,
        (32, 32),
        {
            "semseg": Segmentation(21),
            "saliency": Saliency(),
            "normal": SurfaceNormals(),
            "edge": Edges(thresholds=19),
            "parts": Segmentation(7, skip_absent=True),
        },
    ),
    "taskonomy": (
        SynthTaskonomyDataModule,
        TASKONOMY,
        (16, 16),
        {
            **{key: DenseRegression(1, masked=True) for key in ("de", "dz")},
            **{key: DenseRegression(1) for key in ("eo", "et", "k2", "k3", "s2", "s25")},
            "n": TaskonomyNormals(),
            "c": DenseRegression(2, error="mse"),
            "r": DenseRegression(3),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_forward_loss_backward_metric(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NSCMERGE_CACHE", str(tmp_path))
    kind, options, grid, tasks = SETS[name]
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    model = add_lora(split_qkv(model).requires_grad_(False), LAYERS, rank=16, alpha=16, dropout=0.0)
    assert len(lora_layers(model)) == 48
    features, inputs = None, None
    for key, task in tasks.items():
        data = kind(key, workers=1, **options)
        data.prepare_data()
        data.setup("fit")
        dataset = data.dataset("test")
        batch = collate([dataset[i] for i in range(min(2, len(dataset)))])
        if inputs is None or not torch.equal(inputs["x"], batch["x"]):
            inputs = {"x": batch["x"]}
            features = task.features(model, inputs)
            assert features.shape == (len(batch["x"]), 3072, *grid)
        prediction = task.predict(features, inputs)
        assert prediction.shape[-2:] == options["size"]
        loss = task.loss(prediction, batch["target"])
        assert torch.isfinite(loss)
        loss.backward(retain_graph=True)
        assert task.decoder.weight.grad.isfinite().all()
        metrics = task.metrics()
        metrics.update(prediction.detach(), batch["target"])
        assert all(math.isfinite(value) for value in metrics.compute().values())
    # up-projections start at 0, so that theirs are the first gradients
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) == 48
