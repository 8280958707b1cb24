"""Geometry of images and label maps, normalisation, and where the random draws of training come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules.dense.files import Size
from datamodules.dense.labels import IGNORE, LabelKind
from datamodules.dense.photometric import distort

#: ``imagenet``: (v / 255 - mean) / std; ``half``: 2 v / 255 - 1.
Normalization = Literal["imagenet", "half"]
MEAN_STD: dict[str, tuple[list[float], list[float]]] = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}


def normalize(image: Tensor, normalization: Normalization) -> Tensor:
    """Return float32 (3, H, W) of an image uint8 (3, H, W)."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), *MEAN_STD[normalization])


def centre_pad(tensor: Tensor, size: Size, value: float) -> Tensor:
    """Return (C, max(H, size), max(W, size)), the tensor in the middle; an odd row goes below, an odd column right."""
    down, across = max(size[0] - tensor.shape[-2], 0), max(size[1] - tensor.shape[-1], 0)
    return F.pad(tensor, [across // 2, down // 2, across - across // 2, down - down // 2], fill=value)


@dataclass(frozen=True)
class View:
    """How a sample reaches the model: normalised and padded around, never resized.

    Args:
        size: (H, W) to pad to.
        normalization: Of the image; its padding is 0 afterwards, which is the mean colour.
    """

    size: Size
    normalization: Normalization

    def image(self, image: Tensor) -> Tensor:
        """Return float32 (3, H, W) of uint8 (3, h, w)."""
        return centre_pad(normalize(image, self.normalization), self.size, 0)

    def label(self, label: Tensor, kind: LabelKind) -> Tensor:
        """Return the target of a label map, float32 (C, h, w), in the form that its kind has."""
        return kind.finish(centre_pad(label, self.size, kind.pad))


class Draws:
    """One random generator per training sample: another one for every sample, visit, worker and seed.

    A visit is counted in the process that reads; loader workers, which start anew each epoch, differ by the seed that
    the loader gives them.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.visits = seed, 0

    def __call__(self, index: int) -> np.random.Generator:
        """Return the generator for the next reading of sample ``index``."""
        worker = get_worker_info()
        self.visits += 1
        return np.random.default_rng((self.seed, worker.seed if worker else 0, self.visits, index))


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, flip and colours, shared by an image and its label map.

    Args:
        size: (H, W) of the crop; a picture smaller than that stays whole.
        scale: Range of the factor by which both sides grow.
        flip: Probability of mirroring left to right.
        largest_share: A crop of a ``balanced`` kind is drawn again, up to 10 times, while one label fills more of it.
        colours: Whether the colours change too.
    """

    size: Size
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    largest_share: float = 0.75
    colours: bool = True

    def __call__(
        self, image: Tensor, label: Tensor, kind: LabelKind, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return a random view of an image, uint8 (3, H, W), and of its map, float32 (C, H, W)."""
        image, label = rescale(image, label, rng.uniform(*self.scale), kind)
        box = self._box(label, kind, rng)
        image, label = F.crop(image, *box), F.crop(label, *box)
        if rng.random() < self.flip:
            image, label = F.horizontal_flip(image), kind.flip(label)
        return (distort(image, rng) if self.colours else image), label

    def describe(self) -> dict[str, Any]:
        """Return the options, JSON-able."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def _box(self, label: Tensor, kind: LabelKind, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Return top, left, height, width."""
        height, width = (min(have, want) for have, want in zip(label.shape[-2:], self.size, strict=True))
        last = label.shape[-2] - height, label.shape[-1] - width
        for _ in range(11):
            top, left = (int(rng.integers(0, end, endpoint=True)) for end in last)
            # With nowhere else to go, drawing again gives the same crop.
            if not kind.balanced or last == (0, 0) or self._balanced(F.crop(label, top, left, height, width)):
                break
        return top, left, height, width

    def _balanced(self, label: Tensor) -> bool:
        counts = torch.bincount(label.flatten().long(), minlength=IGNORE + 1)[:IGNORE]
        return int((counts > 0).sum()) > 1 and bool(counts.max() < self.largest_share * counts.sum())


def rescale(image: Tensor, label: Tensor, factor: float, kind: LabelKind) -> tuple[Tensor, Tensor]:
    """Return an image, bilinear, and its label map, nearest, both sides times ``factor`` (rounded down)."""
    size = [max(int(side * factor), 1) for side in image.shape[-2:]]
    # In 8 bit, torch's fast kernel fails on pictures of one pixel.
    image = F.resize(image.float(), size, InterpolationMode.BILINEAR, antialias=False).round().to(torch.uint8)
    label = F.resize(label, size, InterpolationMode.NEAREST)
    return image, kind.scale(label, factor)
