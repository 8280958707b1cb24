import json

import pytest
import torch
from lightning import Trainer

from datamodules.mixed import MixedDataModule
from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError, OutputExistsError
from tasks.pretrain import Pretrain, masked_pixel_loss, patches, present, split_tokens
from tests.fakes.vit import FakeImageDataModule

TINY = {"patch_size": 4, "width": 16, "depth": 4, "heads": 2, "image_size": 16}


def labels(image):
    return (image[0] > 0).long() + 2 * (image[1] > 2).long()


def test_patches_are_normalised_one_by_one():
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    got = patches(x, 4)
    assert got.shape == (2, 6, 48)
    one = x[1, :, 4:8, 8:12].reshape(-1)  # row 1, column 2 is patch 5
    torch.testing.assert_close(got[1, 5], (one - one.mean()) / (one.var() + 1e-2).sqrt())


def test_hidden_patches_alone_count():
    target, hidden = torch.zeros(1, 3, 2), torch.tensor([[True, False, True]])
    prediction = torch.tensor([[[1.0, 1.0], [9.0, 9.0], [2.0, 0.0]]])
    assert float(masked_pixel_loss(prediction, target, hidden)) == pytest.approx((1 + 2) / 2)


def test_presence_leaves_255_out():
    target = torch.tensor([[[0, 2], [255, 2]], [[255, 255], [255, 255]]])
    assert present(target, 3).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_hidden_patches_are_not_seen():
    torch.manual_seed(0)
    model = Pretrain({}, **TINY).eval()
    x = torch.randn(1, 3, 16, 16)
    other = x.clone()
    other[:, :, 4:8, 8:12] += 1  # row 1, column 2 is patch 6 of 16
    without, with_it = torch.tensor([[0, 3, 7, 15]]), torch.tensor([[0, 3, 6, 15]])
    assert model.encode(x, without).shape == (1, 5, 16)
    assert torch.equal(model.encode(x, without), model.encode(other, without))
    assert not torch.allclose(model.encode(x, with_it), model.encode(other, with_it))


def test_all_patches_seen_is_the_model_itself():
    torch.manual_seed(0)
    model = Pretrain({}, **TINY).eval()
    x = torch.randn(2, 3, 12, 16)
    every = torch.arange(12).expand(2, 12)
    torch.testing.assert_close(model.encode(x, every), model.model.forward_features(x))


def test_seen_tokens_come_back_to_their_places():
    torch.manual_seed(0)
    model = Pretrain({}, **TINY).eval()
    model.decoder, model.pixels = torch.nn.Identity(), torch.nn.Identity()
    tokens, seen = torch.randn(1, 3, 16), torch.tensor([[5, 2]])
    got, empty = model.fill_in(tokens, seen, (2, 3)), model.fill_in(tokens[:, :1], seen[:, :0], (2, 3))
    moved = torch.zeros(1, 6, 16)  # the mask token starts at 0
    moved[0, 5], moved[0, 2] = tokens[0, 1], tokens[0, 2]
    torch.testing.assert_close(got - empty, moved)


def test_the_split_hides_as_many_of_every_image():
    seen, hidden = split_tokens(3, 10, 0.6, torch.device("cpu"))
    assert seen.shape == (3, 4)
    assert hidden.sum(1).tolist() == [6, 6, 6]
    assert not hidden.gather(1, seen).any()


def test_a_fit_writes_a_base_that_loads(tmp_path):
    data = MixedDataModule({"a": FakeImageDataModule(labels), "b": FakeImageDataModule(labels, size=4)})
    module = Pretrain({"a": 4}, **TINY, output=tmp_path / "base")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    base = load_base_model(f"timm:{tmp_path / 'base'}")
    x = torch.randn(1, 3, 12, 16)
    torch.testing.assert_close(base(x), module.model.eval()(x), atol=2e-2, rtol=2e-2)  # stored in fp16
    card = json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert card["training"]["steps"] == 3
    assert card["data"]["b"]["data"] == "random images"
    assert {"train/masked/a", "train/masked/b", "train/presence/a"} <= card["last_step"].keys()


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(OutputExistsError, match="is there already"):
        Pretrain({}, **TINY, output=tmp_path)
    with pytest.raises(ConfigError, match="no sources"):
        MixedDataModule({})
