"""Scenes as a tree of NYUD-v2's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.dense.boundaries import evaluation_boundaries
from datamodules.scenes.checks import check_request
from datamodules.scenes.encode import opposite_normal_code, write_png
from datamodules.scenes.labels import nyud_classes
from datamodules.scenes.render import Frame
from datamodules.scenes.views import draw_frame
from nscmerge.errors import ConfigError

#: First number of every scene of this data set.
NUMBER = 1
#: NYUD-v2 numbers its labelled frames 1 to 1449.
MOST = 1449


@dataclass(frozen=True)
class NYUDTree:
    """``images/ segmentation/ depth/ normals/ edge/ gt_sets/{train,val}.txt`` with ids ``0001`` on.

    Args:
        train: Training images.
        test: Images of the official test list, ``gt_sets/val.txt``.
        size: Height and width; the real one is 425 x 560.
        seed: Which scenes.
    """

    train: int = 256
    test: int = 96
    size: tuple[int, int] = (106, 140)
    seed: int = 0

    def __post_init__(self) -> None:
        check_request("synth_nyud", {"train": self.train, "held_out": self.test}, self.size, self.seed)
        if self.train + self.test > MOST:
            raise ConfigError(
                f"{self.train} + {self.test} images: ids are those of NYUD-v2, so 1 to {MOST} can be made."
            )

    @property
    def name(self) -> str:
        """Data set, seed, counts, image size."""
        return f"synth_nyud-seed{self.seed}-{self.train}-{self.test}-{self.size[0]}x{self.size[1]}"

    @property
    def units(self) -> int:
        """One per image."""
        return self.train + self.test

    def write(self, root: Path, unit: int) -> None:
        """Write the five files of one image."""
        write_frame(root, f"{unit + 1:04d}", draw_frame((NUMBER, unit), self.seed, self.size))

    def finish(self, root: Path) -> None:
        """Write the two lists of ids."""
        ids = [f"{unit + 1:04d}\n" for unit in range(self.units)]
        (root / "gt_sets").mkdir()
        (root / "gt_sets" / "train.txt").write_text("".join(ids[: self.train]))
        (root / "gt_sets" / "val.txt").write_text("".join(ids[self.train :]))


def write_frame(root: Path, name: str, frame: Frame) -> None:
    """Write image, classes, depth (metres, 0 at holes), normals (opposite sign) and edges of one frame."""
    write_png(root / "images" / f"{name}.png", frame.image)
    write_png(root / "segmentation" / f"{name}.png", nyud_classes(frame))
    write_png(root / "normals" / f"{name}.png", opposite_normal_code(frame.normal))
    write_png(root / "edge" / f"{name}.png", 255 * evaluation_boundaries(frame.instance).astype(np.uint8))
    depth = root / "depth" / f"{name}.npy"
    depth.parent.mkdir(parents=True, exist_ok=True)
    np.save(depth, np.where(frame.hole, 0.0, frame.depth).astype(np.float32))
