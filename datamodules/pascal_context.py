"""PASCAL-Context as five dense tasks (Mottaghi et al., CVPR 2014; Maninis et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import Split
from datamodules.dense.boundaries import evaluation_boundaries, training_boundaries
from datamodules.dense.context import (
    NORMAL_CATEGORIES,
    PERSON,
    part_categories,
    people_list,
    read_label_map,
    read_parts,
)
from datamodules.dense.datasets import FrameDataset, Frames, NamedDataset
from datamodules.dense.files import Pixels, Size, channels_first, pixel_array, read_image
from datamodules.dense.labels import CLASSES, EDGES, IGNORE, NORMALS, PARTS, SALIENCY
from datamodules.dense.lists import Place, check_disjoint, check_list, check_present, read_ids
from datamodules.dense.module import DenseDataModule
from datamodules.dense.transforms import Augmentation, Normalization, View
from nscmerge.errors import DataError

#: Folders and suffix of what every image has.
PLACES: list[Place] = [
    (("JPEGImages",), ".jpg"),
    (("semseg/VOC12", "semseg/pascal-context"), ".png"),
    (("pascal-context/trainval",), ".mat"),
    (("human_parts",), ".mat"),
    (("normals_distill",), ".png"),
    (("sal_distill",), ".png"),
]
#: Which list under ImageSets/Context is which split.
LISTS: dict[Split, str] = {"train": "train", "val": "val_new", "test": "test_new"}


def read_semseg(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (1, H, W): 0 (background) to 20, and 255; VOC's own map where there is one."""
    file = root / "semseg" / "VOC12" / f"{name}.png"
    if not file.is_file():
        file = root / "semseg" / "pascal-context" / f"{name}.png"
    labels = pixel_array(read_image(file, Pixels.LABELS, size))
    if (odd := labels[(labels > 20) & (labels != IGNORE)]).size:
        raise DataError(f"{file} holds the label {odd[0]}; expected 0 to 20, or 255 (void).")
    return channels_first(labels).float()


def read_part_groups(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (1, H, W): 0 to 6."""
    return channels_first(read_parts(root, name, size)).float()


def read_saliency(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (1, H, W): 1 above half of the file's range, else 0."""
    pixels = pixel_array(read_image(root / "sal_distill" / f"{name}.png", Pixels.GREY, size))
    return channels_first(pixels > 127).float()  # 127.5 / 255 is the half


def read_normals(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (3, H, W) in [-1, 1], zero on categories that the teacher network never saw."""
    pixels = pixel_array(read_image(root / "normals_distill" / f"{name}.png", Pixels.RGB, size))
    known = np.isin(read_label_map(root, name, size), list(NORMAL_CATEGORIES))
    return (channels_first(pixels).float() * 2 / 255 - 1) * torch.from_numpy(known)


def read_training_edges(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (2, H, W): boundaries by the Laplacian in {0, 1}, and 255, as training evaluates nothing."""
    edges = torch.from_numpy(training_boundaries(read_label_map(root, name, size))).float()
    return torch.stack([edges, torch.full_like(edges, IGNORE)])


def read_edges(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (2, H, W), both in {0, 1}: boundaries as training, and as ods-F takes them."""
    labels = read_label_map(root, name, size)
    return torch.from_numpy(np.stack([training_boundaries(labels), evaluation_boundaries(labels)])).float()


#: Per task: the kind of map, the reader of what is evaluated with, and that of what is trained on.
TASKS = {
    "semseg": (CLASSES, read_semseg, read_semseg),
    "parts": (PARTS, read_part_groups, read_part_groups),
    "saliency": (SALIENCY, read_saliency, read_saliency),
    "normal": (NORMALS, read_normals, read_normals),
    "edge": (EDGES, read_edges, read_training_edges),
}


class PascalContextDataModule(DenseDataModule):
    """PASCAL-Context: 4998 images to train, 2607 of the official validation list to validate, 2498 to test.

    Layout (``PASCALContext.tar.gz`` of the InvPT repository, the tree of ASTMT's ``PASCAL_MT.tgz``):
    ``JPEGImages/<id>.jpg``; ``semseg/VOC12/<id>.png``, else ``semseg/pascal-context/<id>.png``;
    ``pascal-context/trainval/<id>.mat``; ``human_parts/<id>.mat``; ``normals_distill/<id>.png``;
    ``sal_distill/<id>.png``; ``ImageSets/Context/{train,val_new,test_new}.txt``; ``ImageSets/Parts/<list>.txt``.
    The archive lacks ``val_new.txt`` and ``test_new.txt``: take them from SEISM,
    ``src/gt_wrappers/gt_sets/PASCALContext``. Every id must have all of its files, whatever the task.
    ``parts`` sees images with people only, as in the family; where ``ImageSets/Parts`` does not say who they are, it is
    found out from ``human_parts``, in memory. Training scales, crops, flips and changes colours; evaluation pads, and
    never resizes.

    Targets: ``semseg``, ``parts``, ``saliency`` int64 (H, W), 0 to 20, 0 to 6, 0 or 1; ``normal`` float32 (3, H, W);
    ``edge`` float32 (2, H, W), see :func:`read_edges`. 255 is not to be counted in any of them.

    Args:
        task: ``semseg``, ``parts``, ``saliency``, ``normal`` or ``edge``.
        root: Folder of the data set.
        size: (H, W) of the crop in training, and to which evaluation pads.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random views of the training samples.
        normalization: Of the images.
        verify: Read every file during setup; see :class:`DenseDataModule`.

    Raises:
        ConfigError: An option is out of range.
    """

    data_name: ClassVar[str] = "PASCAL-Context"
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    expected_hashes: ClassVar[Mapping[str, str] | None] = {
        "train": "b5a02b12bee56b77",
        "val_new": "1ec527835c902925",
        "test_new": "1998ea178a4683c8",
    }
    expected_counts: ClassVar[Mapping[str, int] | None] = {"train": 4998, "val_new": 2607, "test_new": 2498}

    def __init__(
        self,
        task: Literal["semseg", "parts", "saliency", "normal", "edge"],
        root: Path,
        size: tuple[int, int] = (512, 512),
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        normalization: Normalization = "imagenet",
        verify: bool = False,
    ) -> None:
        super().__init__(task, root, size, normalization, batch_size, eval_batch_size, num_workers, seed, verify)
        self._dropped: dict[str, int] = {}

    def read_splits(self) -> dict[Split, NamedDataset]:
        """Return the splits; see :meth:`DenseDataModule.read_splits`."""
        lists: dict[str, Sequence[str]] = {}
        for name in LISTS.values():
            file = self.root / "ImageSets" / "Context" / f"{name}.txt"
            lists[f"ImageSets/Context/{name}.txt"] = ids = read_ids(file, self.data_name, self._remedy(name))
            check_list(file, self.data_name, ids, self.expected_count(name), self.expected_hash(name))
        check_disjoint(self.data_name, lists)
        check_present(self.data_name, self.root, lists, PLACES)
        splits = dict(zip(LISTS, lists.values(), strict=True))
        if self.task == "parts":
            splits = {split: self._with_people(split, ids) for split, ids in splits.items()}
        kind, read, read_training = TASKS[self.task]
        frames = Frames(self.root, "JPEGImages", ".jpg", self.expected_image_size, read, read_training, kind)
        view = View(self.size, self.normalization)
        return {
            "train": FrameDataset(frames, splits["train"], view, Augmentation(self.size), self.seed),
            "val": FrameDataset(frames, splits["val"], view),
            "test": FrameDataset(frames, splits["test"], view),
        }

    def facts(self) -> dict[str, Any]:
        """Return how many images without people were dropped, and the options of training views."""
        dropped = {split: {"without people": n} for split, n in self._dropped.items()}
        return {"dropped": dropped, "augmentation": Augmentation(self.size).describe()}

    def pool_key(self) -> Hashable:
        """Return which images the task sees: ``parts`` has its own."""
        return "people" if self.task == "parts" else "all"

    def _with_people(self, split: Split, ids: Sequence[str]) -> list[str]:
        folder = self.root / "ImageSets" / "Parts"
        file = folder / f"{LISTS[split]}.txt"
        categories = people_list(self.root, file, ids)
        if categories is None and split != "train":  # the archive has one list for both
            categories = people_list(self.root, folder / "val.txt", ids)
        if categories is None:
            rank_zero_info(f"{self.data_name}: {file} does not list the people of '{split}'; reading {len(ids)} files.")
            categories = {i: part_categories(self.root, i) for i in ids}
        people = [i for i in ids if PERSON in categories[i]]
        if not people:
            raise DataError(f"{self.data_name}: none of the {len(ids)} images of '{split}' shows a person; see {file}.")
        self._dropped[split] = len(ids) - len(people)
        return people

    def _remedy(self, name: str) -> str:
        count, sha256 = self.expected_count(name), self.expected_hash(name)
        known = f" ({count} ids; SHA-256 of the sorted ids starts {sha256})" if count and sha256 else ""
        source = "SEISM (src/gt_wrappers/gt_sets/PASCALContext)" if name != "train" else "the data set's archive"
        return f"Set data.init_args.root to the data set's folder and put the published list{known} of {source} there."
