"""Tiny vision transformers and image tasks: a timm folder of random weights, and data modules of made-up images."""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from datamodules.base import LabelledDataset, Sample, Split, TaskDataModule
from nscmerge.timm_model import write_timm

ARCHITECTURE = "vit_tiny_patch16_224"
WIDTH, DEPTH, PATCH = 16, 4, 4
ARGUMENTS = {
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "img_size": 16,
    "dynamic_img_size": True,
}


def tiny_vit(seed: int = 0) -> nn.Module:
    """Return a random vision transformer of width 16, depth 4, patch 4, made for 16 x 16 pixels, attention fused."""
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=0, **ARGUMENTS).eval()


def write_tiny_vit(folder: Path, seed: int = 0) -> Path:
    """Write :func:`tiny_vit` as a timm folder and return it."""
    folder.mkdir(parents=True)
    write_timm(tiny_vit(seed), ARCHITECTURE, ARGUMENTS, (16, 16), folder, half=False)
    return folder


class Images(LabelledDataset):
    """Random images, (3, H, W); ``label`` makes a target of one."""

    def __init__(self, size: int, seed: int, label, shape: tuple[int, int] = (12, 16)) -> None:
        self.images = torch.randn(size, 3, *shape, generator=torch.Generator().manual_seed(seed))
        self.label = label

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, index: int) -> Sample:
        return {"x": self.images[index]}

    def target(self, index: int) -> Tensor:
        return self.label(self.images[index])


class FakeImageDataModule(TaskDataModule):
    """Train, val and test of different :class:`Images`."""

    def __init__(self, label, size: int = 8, batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=3)
        self.sets = {split: Images(size, i, label) for i, split in enumerate(("train", "val", "test"))}

    def dataset(self, split: Split) -> Images:
        return self.sets[split]

    def describe(self) -> dict[str, str]:
        return {"data": "random images"}
