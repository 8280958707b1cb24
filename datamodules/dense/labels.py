"""Kinds of label map: how each goes through scaling, flipping, padding, and into its final form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

#: What a pixel that counts nowhere holds, in class maps and in maps of numbers.
IGNORE = 255


def _unscaled(label: Tensor, factor: float) -> Tensor:
    return label


def flip(label: Tensor) -> Tensor:
    """Return a map (C, H, W) mirrored left to right."""
    return F.horizontal_flip(label)


def flip_normals(label: Tensor) -> Tensor:
    """Return normals (3, H, W) mirrored left to right: x changes its sign too. Zero vectors stay zero."""
    mirrored = F.horizontal_flip(label)
    return torch.cat([-mirrored[:1], mirrored[1:]])


def _nearer(depth: Tensor, factor: float) -> Tensor:
    # A larger picture of the same thing was taken from nearer.
    return depth / factor


def as_classes(label: Tensor) -> Tensor:
    """Return int64 (H, W) of a class map (1, H, W)."""
    return label[0].long()


def as_parts(label: Tensor) -> Tensor:
    """Return int64 (H, W); a map without any part counts nowhere, as nobody may have annotated it."""
    classes = as_classes(label)
    annotated = ((classes != 0) & (classes != IGNORE)).any()
    return classes if annotated else torch.full_like(classes, IGNORE)


def as_depth(label: Tensor) -> Tensor:
    """Return float32 (H, W) in metres; 0, where nothing was measured, becomes 255."""
    return label[0].masked_fill(label[0] == 0, IGNORE)


def as_normals(label: Tensor) -> Tensor:
    """Return float32 (3, H, W); the zero vector becomes 255 in all three channels."""
    return label.masked_fill((label == 0).all(0), IGNORE)


def as_edges(label: Tensor) -> Tensor:
    """Return float32 (2, H, W) as it is: the training map, and the map that is evaluated with."""
    return label


@dataclass(frozen=True)
class LabelKind:
    """What tells one kind of label map from another; all functions take float32 (C, H, W).

    Args:
        finish: Gives the target its final form, after padding.
        pad: What padding holds.
        flip: Mirrors left to right.
        scale: Corrects values for a picture that was enlarged by a factor.
        balanced: A random crop should not show one label only.
    """

    finish: Callable[[Tensor], Tensor]
    pad: float = IGNORE
    flip: Callable[[Tensor], Tensor] = flip
    scale: Callable[[Tensor, float], Tensor] = _unscaled
    balanced: bool = False


CLASSES = LabelKind(as_classes, balanced=True)
PARTS = LabelKind(as_parts, balanced=True)
SALIENCY = LabelKind(as_classes)
DEPTH = LabelKind(as_depth, pad=0, scale=_nearer)
NORMALS = LabelKind(as_normals, pad=0, flip=flip_normals)
EDGES = LabelKind(as_edges)
