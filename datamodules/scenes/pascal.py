"""Scenes as a tree of PASCAL-Context's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from datamodules.scenes.checks import check_request
from datamodules.scenes.encode import opposite_normal_code, write_png
from datamodules.scenes.labels import context_categories, salient, voc_classes, with_void_rims
from datamodules.scenes.render import Frame
from datamodules.scenes.views import draw_frame

#: First number of every scene of this data set.
NUMBER = 2
HEADER = b"MATLAB 5.0 MAT-file, synthetic ray-cast scenes (nscmerge)"


@dataclass(frozen=True)
class PascalTree:
    """``JPEGImages/ semseg/{VOC12,pascal-context}/ pascal-context/trainval/ human_parts/ normals_distill/ sal_distill/
    ImageSets/{Context,Parts}/`` with ids ``2026_000001`` on.

    Every other class map lies in ``semseg/VOC12`` and has VOC's void rims of two pixels; the rest lie in
    ``semseg/pascal-context`` and have none.

    Args:
        train: Training images.
        val: Images of the first half of the official validation list, ``val_new.txt``.
        test: Images of its second half, ``test_new.txt``.
        size: Height and width; None draws sizes of at most 128 a side, some upright.
        seed: Which scenes.
    """

    train: int = 256
    val: int = 48
    test: int = 48
    size: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_request("synth_pascal", {"train": self.train, "val": self.val, "test": self.test}, self.size, self.seed)

    @property
    def name(self) -> str:
        """Data set, seed, counts, image size."""
        size = f"{self.size[0]}x{self.size[1]}" if self.size else "128"
        return f"synth_pascal-seed{self.seed}-{self.train}-{self.val}-{self.test}-{size}"

    @property
    def units(self) -> int:
        """One per image."""
        return self.train + self.val + self.test

    def write(self, root: Path, unit: int) -> None:
        """Write the six files of one image."""
        frame = draw_frame((NUMBER, unit), self.seed, self.size)
        write_frame(root, _name(unit), frame, void_rims=unit % 2 == 0)

    def finish(self, root: Path) -> None:
        """Write the lists of ids, and which categories' objects each image holds."""
        # Here, as it brings torch, which workers do without.
        from datamodules.dense.context import part_categories

        ids = [_name(unit) for unit in range(self.units)]
        lists = {
            "train": ids[: self.train],
            "val": ids[self.train :],
            "val_new": ids[self.train : self.train + self.val],
            "test_new": ids[self.train + self.val :],
        }
        for folder in ("Context", "Parts"):
            (root / "ImageSets" / folder).mkdir(parents=True)
        for split, names in lists.items():
            (root / "ImageSets" / "Context" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
            categories = {name: part_categories(root, name) for name in names}
            (root / "ImageSets" / "Parts" / f"{split}.txt").write_text(json.dumps(categories, indent=1))


def _name(unit: int) -> str:
    return f"2026_{unit + 1:06d}"


def write_frame(root: Path, name: str, frame: Frame, void_rims: bool) -> None:
    """Write image, classes, categories, parts, normals (opposite sign) and saliency of one frame."""
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    classes = voc_classes(frame)
    if void_rims:
        write_png(root / "semseg" / "VOC12" / f"{name}.png", with_void_rims(classes))
    else:
        write_png(root / "semseg" / "pascal-context" / f"{name}.png", classes)
    write_png(root / "normals_distill" / f"{name}.png", opposite_normal_code(frame.normal))
    write_png(root / "sal_distill" / f"{name}.png", 255 * salient(frame).astype(np.uint8))
    _save(root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": context_categories(frame)})
    _save(root / "human_parts" / f"{name}.mat", {"anno": annotation(name, frame)})


def annotation(name: str, frame: Frame) -> NDArray[Any]:
    """Return PASCAL Parts' struct: ``imname``, ``objects`` of ``class, class_ind, mask, parts`` of ``part_name, mask``.

    Args:
        name: Image id.
        frame: What it shows; every instance of a VOC class is an object, people alone have parts.

    Returns:
        One record (1, 1) whose fields hold arrays as :func:`scipy.io.loadmat` gives them back.
    """
    objects = []
    for instance in dict.fromkeys(s.instance for s in frame.scene.solids if s.labels.voc):
        mask = frame.instance == instance
        if not mask.any():
            continue
        solids = [(number, s) for number, s in enumerate(frame.scene.solids) if s.instance == instance]
        seen = [(s.part, frame.solid == number) for number, s in solids if s.part and (frame.solid == number).any()]
        parts = _records(["part_name", "mask"], [(part, where.astype(np.uint8)) for part, where in seen])
        _, first = solids[0]
        objects.append((first.kind, np.uint8(first.labels.voc), mask.astype(np.uint8), parts))
    fields = ["class", "class_ind", "mask", "parts"]
    return _records(["imname", "objects"], [(name, _records(fields, objects))])


def _records(fields: list[str], rows: Sequence[tuple[object, ...]]) -> NDArray[Any]:
    """Return a struct array (1, N) with fields of dtype object; where there are no rows, MATLAB's empty 0 x 0 array."""
    if not rows:
        return np.zeros((0, 0))
    records = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        records[0, column] = row
    return records


def _save(path: Path, content: dict[str, NDArray[np.generic]]) -> None:
    stream = BytesIO()
    savemat(stream, content, do_compression=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The header's 116 bytes of text would say when it was written: no two renders were equal.
    path.write_bytes(HEADER.ljust(116) + stream.getvalue()[116:])
