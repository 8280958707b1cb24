"""Random changes of an image's colours, as the family trains with on NYUD-v2 and PASCAL-Context."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def shift_brightness(image: Tensor, delta: float) -> Tensor:
    """Return uint8 (3, H, W) with ``delta`` (in 1/255) added, clamped."""
    return (image.float() + delta).clamp(0, 255).to(torch.uint8)


def scale_contrast(image: Tensor, factor: float) -> Tensor:
    """Return uint8 (3, H, W) times ``factor``, clamped: about black, which torchvision calls brightness."""
    return F.adjust_brightness(image, factor)


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Return uint8 (3, H, W) with the S of HSV times ``factor``, clamped; H and V stay.

    V is the largest channel and S = 1 - min / V, so every channel's distance from V goes times the factor, or times
    what makes the smallest channel 0. torchvision blends with grey instead, which moves V.
    """
    rgb = image.float()
    value, least = rgb.amax(0), rgb.amin(0)
    limit = value / (value - least).clamp_min(1e-6)
    return (value - (value - rgb) * limit.clamp(max=factor)).round().clamp(0, 255).to(torch.uint8)


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a random variant of uint8 (3, H, W), each step taken with probability 1/2.

    Brightness +-32; contrast 0.5 to 1.5, before or after the two that follow; saturation 0.5 to 1.5; hue by -18 to 17
    steps of 2 degrees.

    Source: ``PhotoMetricDistortion`` in ``data/transforms.py`` of the family's loaders.
    """
    if rng.random() < 0.5:
        image = shift_brightness(image, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = scale_contrast(image, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        image = scale_saturation(image, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        image = F.adjust_hue(image, int(rng.integers(-18, 18)) / 180)
    if not contrast_first and rng.random() < 0.5:
        image = scale_contrast(image, rng.uniform(0.5, 1.5))
    return image
