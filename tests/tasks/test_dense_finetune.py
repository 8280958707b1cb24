"""Dense experts end to end on made-up images: step-based training, the folder, and who can read it."""

import json

import pytest
import torch
from lightning import Trainer
from peft import PeftModel
from timm.layers import DropPath
from torch.optim import Adam
from torch.utils.data import DataLoader

from datamodules.base import collate
from nscmerge.adapters import load_adapter
from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError
from tasks.dense_regression import DenseRegression
from tasks.depth import Depth
from tasks.edges import Edges
from tasks.finetune import FineTune
from tasks.segmentation import Segmentation
from tests.fakes.vit import DEPTH, WIDTH, FakeImageDataModule, write_tiny_vit

SIZE = {"width": WIDTH, "depth": DEPTH}
LAYERS = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj"]


def classes(image):
    return (image[0] > 0).long() + (image[1] > 1).long()


def metres(image):
    return 2 + image[0]


def boundaries(image):
    edge = (image[0] > 1).float()
    return torch.stack([edge, edge])


TASKS = {
    "semseg": (Segmentation(3, **SIZE), classes),
    "depth": (Depth(**SIZE), metres),
    "edge": (Edges(thresholds=19, **SIZE), boundaries),
    "tax_de": (DenseRegression(1, masked=True, **SIZE), lambda x: torch.stack([x[0], torch.ones_like(x[0])])),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return f"timm:{write_tiny_vit(tmp_path_factory.mktemp('base') / 'vit')}"


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **{"logger": False, "max_steps": 2, "val_check_interval": 1, **options},
    )


def module(base, task, **options):
    torch.manual_seed(0)
    return FineTune(
        task,
        base,
        rank=2,
        alpha=2,
        target_modules=LAYERS,
        dropout=0.0,
        **{"lr": 1e-2, "optimizer": Adam, "schedule": "poly", "warmup": 0.0, **options},
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_expert_folder_predicts_what_was_scored(base, tmp_path, name):
    task, label = TASKS[name]
    data = FakeImageDataModule(label)
    fine = module(base, task, name=name, output=tmp_path / "expert")
    run = trainer(tmp_path)
    run.fit(fine, datamodule=data)
    assert run.global_step == 2

    card = json.loads((tmp_path / "expert" / "expert.json").read_text())
    again = type(task)(**card["task"]["init_args"])
    adapter = load_adapter(tmp_path / "expert", name=name)
    again.load_head(adapter.head, name)
    assert len(adapter.layers) == 4 * DEPTH
    # plain PEFT on the split model is our own merge of base and adapter
    model = PeftModel.from_pretrained(load_base_model(base), tmp_path / "expert").base_model.model
    metrics = again.metrics()
    with torch.no_grad():
        for batch in DataLoader(data.dataset("test"), batch_size=3, collate_fn=collate):
            target = batch.pop("target")
            prediction = again(model, batch)
            torch.testing.assert_close(prediction, fine.eval()(batch), atol=1e-5, rtol=1e-4)
            metrics.update(prediction, target)
    scored = {key: float(value) for key, value in metrics.compute().items()}
    assert card["scores"]["test"] == pytest.approx(scored, abs=1e-5)
    assert card["metric"] == {"primary": task.primary, "higher_is_better": task.higher_is_better}
    assert card["base_model"]["id"] == adapter.base_model == base
    assert len(card["base_model"]["sha256"]) == 64
    assert card["data"] == {"class_path": "tests.fakes.vit.FakeImageDataModule", "data": "random images"}
    assert card["training"]["optimizer"] == "Adam"
    assert (card["training"]["schedule"], card["training"]["steps"]) == ("poly", 2)


def test_the_optimizer_gets_rates_decay_and_poly(base, tmp_path):
    fine = module(base, TASKS["depth"][0], lr=2e-3, head_lr=4e-3, weight_decay=1e-6)
    rates = []

    class Watch(FineTune):
        def on_train_batch_end(self, *args):
            optimizer = self.trainer.optimizers[0]
            rates.append([group["lr"] for group in optimizer.param_groups])
            assert type(optimizer) is Adam
            assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-6}

    fine.__class__ = Watch
    trainer(tmp_path, max_steps=4, val_check_interval=4).fit(fine, datamodule=FakeImageDataModule(metres))
    # after step s the rate is that of step s + 1: (1 - s / 4)^0.9; the head's group comes first
    expected = [[4e-3 * f, 2e-3 * f] for f in ((3 / 4) ** 0.9, (1 / 2) ** 0.9, (1 / 4) ** 0.9, 0.0)]
    assert rates == [pytest.approx(pair) for pair in expected]


def test_a_decoder_can_start_at_the_constant(base, tmp_path):
    flat = FakeImageDataModule(lambda x: x[:1].clamp(min=0))
    task = DenseRegression(1, from_constant=True, **SIZE)
    trainer(tmp_path, max_steps=1).fit(module(base, task, lr=0.0), datamodule=flat)
    train = torch.stack([flat.dataset("train").target(i) for i in range(8)])
    assert task.decoder.bias.tolist() == pytest.approx([float(train.median())], abs=1e-3)  # rounded to fp16
    assert not task.decoder.weight.any()
    other = DenseRegression(1, **SIZE)
    weight = other.decoder.weight.clone()
    trainer(tmp_path, max_steps=1).fit(module(base, other, lr=0.0), datamodule=flat)
    torch.testing.assert_close(other.decoder.weight, weight, atol=1e-3, rtol=1e-3)


def test_curves_of_edges_are_cheap_and_the_final_score_is_not(base, tmp_path):
    fine = module(base, TASKS["edge"][0])
    assert list(fine.val_metrics) == ["val/edge_refloss"]
    assert set(fine.test_metrics) == {"test/odsF", "test/oisF", "test/AP", "test/edge_refloss"}


def test_only_stochastic_depth_is_in_training_mode(base):
    fine = module(base, TASKS["depth"][0], drop_path=0.5)
    fine.configure_model()
    modes = {m.training for m in fine.model.modules() if isinstance(m, DropPath)}
    assert modes == {True}
    assert not fine.model.blocks[0].attn.training
    x = {"x": torch.randn(4, 3, 12, 16)}
    assert not torch.equal(fine(x), fine(x))
    fine.eval()
    assert torch.equal(fine(x), fine(x))


def test_a_head_of_another_width_is_refused_before_training(base):
    with pytest.raises(ConfigError, match="expects a vision transformer of width 768"):
        module(base, Depth()).configure_model()
