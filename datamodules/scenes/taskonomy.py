"""Scenes as a tree of Taskonomy's layout, as Omnidata distributes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.scenes.checks import check_request
from datamodules.scenes.cues import (
    keypoints_2d,
    keypoints_3d,
    luma,
    occlusion_edge,
    principal_curvature,
    reshading,
    texture_edge,
)
from datamodules.scenes.encode import depth_code, response_code, taskonomy_normal_code, write_png
from datamodules.scenes.render import Frame
from datamodules.scenes.scene import draw_scene
from datamodules.scenes.segments import segments_2d, segments_25d
from datamodules.scenes.views import draw_view, generator
from nscmerge.errors import ConfigError

#: First number of every scene of this data set.
NUMBER = 3
#: Views of one room, each with its own camera.
VIEWS_PER_POINT = 2


@dataclass(frozen=True)
class TaskonomyTree:
    """``<domain>/taskonomy/<building>/point_<P>_view_<V>_domain_<domain>.png`` and the CSV of splits by building.

    A point is a room; buildings are numbered rooms that no other split has.

    Args:
        train: Training buildings.
        val: Validation buildings.
        test: Test buildings.
        views: Images per building, a multiple of two: two views of each room.
        size: Height and width; the real one is 512 x 512.
        seed: Which scenes.
        incomplete: Leave one file of the first building out, its first texture edge, as the real download does.
    """

    train: int = 16
    val: int = 3
    test: int = 3
    views: int = 16
    size: tuple[int, int] = (128, 128)
    seed: int = 0
    incomplete: bool = False

    def __post_init__(self) -> None:
        counts = {"train": self.train, "val": self.val, "test": self.test}
        check_request("synth_taskonomy", counts, self.size, self.seed)
        if self.views < 1 or self.views % VIEWS_PER_POINT:
            raise ConfigError(f"{self.views} views per building; give a multiple of {VIEWS_PER_POINT}.")

    @property
    def name(self) -> str:
        """Data set, seed, counts, image size."""
        counts = f"{self.train}-{self.val}-{self.test}x{self.views}"
        lacking = "-incomplete" if self.incomplete else ""
        return f"synth_taskonomy-seed{self.seed}-{counts}-{self.size[0]}x{self.size[1]}{lacking}"

    @property
    def units(self) -> int:
        """One per room."""
        return (self.train + self.val + self.test) * self.views // VIEWS_PER_POINT

    def write(self, root: Path, unit: int) -> None:
        """Write the maps of all views of one room."""
        building, point = divmod(unit, self.views // VIEWS_PER_POINT)
        rng = generator(self.seed, NUMBER, unit)
        scene = draw_scene(rng)
        for view in range(VIEWS_PER_POINT):
            for domain, values in domains(draw_view(scene, self.size, rng)).items():
                write_png(self._file(root, domain, building, point, view), values)

    def finish(self, root: Path) -> None:
        """Write the CSV, and take the one file away that ``incomplete`` asks for."""
        rows = ["id,train,val,test"]
        splits = [(1, 0, 0)] * self.train + [(0, 1, 0)] * self.val + [(0, 0, 1)] * self.test
        rows += [f"{_building(number)},{train},{val},{test}" for number, (train, val, test) in enumerate(splits)]
        file = root / "splits_taskonomy" / "train_val_test_tiny.csv"
        file.parent.mkdir()
        file.write_text("\n".join(rows) + "\n")
        if self.incomplete:
            self._file(root, "edge_texture", 0, 0, 0).unlink()

    def _file(self, root: Path, domain: str, building: int, point: int, view: int) -> Path:
        name = f"point_{point}_view_{view}_domain_{domain}.png"
        return root / domain / "taskonomy" / _building(building) / name


def _building(number: int) -> str:
    return f"synth{number:03d}"


def domains(frame: Frame) -> dict[str, NDArray[np.uint8] | NDArray[np.uint16]]:
    """Return the image and the twelve coded maps of one view, by domain, in the released files' modes."""
    z_code = depth_code(frame.depth, frame.hole)
    normal_code = taskonomy_normal_code(frame.normal, frame.hole)
    edge_code = response_code(occlusion_edge(z_code))
    grey = luma(frame.image)
    return {
        "rgb": frame.image,
        "depth_euclidean": depth_code(frame.distance, frame.hole),
        "depth_zbuffer": z_code,
        "edge_occlusion": edge_code,
        "edge_texture": response_code(texture_edge(grey)),
        "keypoints2d": response_code(keypoints_2d(grey)),
        "keypoints3d": response_code(keypoints_3d(frame)),
        "normal": normal_code,
        "principal_curvature": principal_curvature(frame),
        "reshading": np.repeat(reshading(frame)[..., None], 3, axis=2),
        "segment_unsup2d": segments_2d(frame.image),
        "segment_unsup25d": segments_25d(z_code, normal_code, edge_code),
    }
