"""Maps that follow from which solid a pixel shows: classes, salient objects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter

from datamodules.scenes.render import Frame

#: VOC's label of pixels that are not scored.
VOID = 255


def nyud_classes(frame: Frame) -> NDArray[np.uint8]:
    """Return NYUD's class 1..40 per pixel (H, W), 0 where the ray met nothing."""
    return frame.table([s.labels.nyud for s in frame.scene.solids]).astype(np.uint8)


def voc_classes(frame: Frame) -> NDArray[np.uint8]:
    """Return VOC's class 0..20 per pixel (H, W)."""
    return frame.table([s.labels.voc for s in frame.scene.solids]).astype(np.uint8)


def context_categories(frame: Frame) -> NDArray[np.uint16]:
    """Return PASCAL-Context's category 1..459 per pixel (H, W): its ``LabelMap``."""
    return frame.table([s.labels.context for s in frame.scene.solids]).astype(np.uint16)


def with_void_rims(classes: NDArray[np.uint8], width: int = 2) -> NDArray[np.uint8]:
    """Return ``classes`` (H, W) with 255 wherever another class is within ``width`` pixels, as VOC draws outlines."""
    window = 2 * width + 1
    mixed = maximum_filter(classes, window) != minimum_filter(classes, window)
    return np.where(mixed, VOID, classes).astype(np.uint8)


def salient(frame: Frame) -> NDArray[np.bool_]:
    """Return the one or two objects that are largest and nearest to the centre (H, W); none in an empty room.

    An object scores its share of pixels, less the farther its middle is from the image's; the second one counts if it
    reaches half the score of the first. Rugs and wall hangings are objects as all others.
    """
    height, width = frame.size
    v, u = np.mgrid[:height, :width]
    off = np.hypot((v - (height - 1) / 2) / height, (u - (width - 1) / 2) / width)
    scores: dict[int, float] = {}
    for solid in frame.scene.solids:
        if not solid.is_room and solid.instance not in scores:
            mask = frame.instance == solid.instance
            if mask.any():
                scores[solid.instance] = float(mask.mean() * np.exp(-4 * off[mask].mean()))
    chosen = sorted(scores, key=lambda instance: -scores[instance])[:2]
    chosen = [one for one in chosen if scores[one] >= 0.5 * scores[chosen[0]]]
    return np.isin(frame.instance, chosen)
