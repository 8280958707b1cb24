"""NYUD-v2 as four dense tasks (Silberman et al., ECCV 2012), in the PNG layout of the multi-task family."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.base import Split
from datamodules.dense.boundaries import evaluation_boundaries
from datamodules.dense.datasets import FrameDataset, Frames, NamedDataset
from datamodules.dense.files import Pixels, Size, channels_first, pixel_array, read_array, read_image
from datamodules.dense.labels import CLASSES, DEPTH, EDGES, IGNORE, NORMALS
from datamodules.dense.lists import Place, check_disjoint, check_list, check_present, halves, read_ids, stems
from datamodules.dense.module import DenseDataModule
from datamodules.dense.transforms import Augmentation, Normalization, View
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError, OutputExistsError

#: Folder and suffix of what every frame has.
PLACES: list[Place] = [
    (("images",), ".png"),
    (("segmentation",), ".png"),
    (("depth",), ".npy"),
    (("normals",), ".png"),
    (("edge",), ".png"),
]
#: Farthest credible depth in metres; millimetres are far beyond it. The sensor ends at 10.
FARTHEST = 100.0


def read_segmentation(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (1, H, W): 0 to 39, and 255 where the file has 0, unlabelled."""
    file = root / "segmentation" / f"{name}.png"
    labels = pixel_array(read_image(file, Pixels.LABELS, size))
    if labels.max() > 40:
        raise DataError(f"{file} holds the label {labels.max()}; expected 0 (unlabelled) to 40.")
    # 0 - 1 wraps to 255 in 8 bit, which is the label to ignore.
    return channels_first(labels - np.uint8(1)).float()


def read_depth(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (1, H, W) in metres, 0 where nothing was measured."""
    file = root / "depth" / f"{name}.npy"
    depth = read_array(file, size)
    if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() > FARTHEST:
        raise DataError(
            f"{file} holds depths from {depth.min():g} to {depth.max():g}; expected finite metres, 0 (missing) to "
            f"{FARTHEST:g}. Use the unmodified files of the data set."
        )
    return channels_first(depth)


def read_normals(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (3, H, W) in [-1, 1]; eight bits never give the zero vector, so every pixel counts."""
    pixels = pixel_array(read_image(root / "normals" / f"{name}.png", Pixels.RGB, size))
    return channels_first(pixels).float() * 2 / 255 - 1


def _edge_pixels(root: Path, name: str, size: Size) -> np.ndarray[Any, np.dtype[np.uint8]]:
    file = root / "edge" / f"{name}.png"
    pixels = pixel_array(read_image(file, Pixels.GREY, size))
    if not np.isin(pixels, (0, 255)).all():
        odd = pixels[(pixels != 0) & (pixels != 255)][0]
        raise DataError(f"{file} holds the value {odd}; an edge map has 0 and 255 only.")
    return pixels


def read_training_edges(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (2, H, W): the edge map in {0, 1}, and 255 all over, as training evaluates nothing."""
    edges = channels_first(_edge_pixels(root, name, size)).float() / 255
    return torch.cat([edges, torch.full_like(edges, IGNORE)])


def read_edges(root: Path, name: str, size: Size) -> Tensor:
    """Return float32 (2, H, W), both in {0, 1}: the edge map, and its boundaries as ods-F takes them."""
    pixels = _edge_pixels(root, name, size)
    return torch.from_numpy(np.stack([pixels / 255, evaluation_boundaries(pixels)])).float()


#: Per task: the kind of map, the reader of what is evaluated with, and that of what is trained on.
TASKS = {
    "semseg": (CLASSES, read_segmentation, read_segmentation),
    "depth": (DEPTH, read_depth, read_depth),
    "normal": (NORMALS, read_normals, read_normals),
    "edge": (EDGES, read_edges, read_training_edges),
}


class NYUDDataModule(DenseDataModule):
    """NYUD-v2: 795 frames to train; of the official 654 test frames one half to validate, one to test.

    Layout (``NYUDv2.tar.gz`` of the InvPT repository): ``images/<id>.png``, ``segmentation/<id>.png``,
    ``depth/<id>.npy``, ``normals/<id>.png``, ``edge/<id>.png``, ``gt_sets/train.txt``, ``gt_sets/val.txt``. The NSC
    paper divides the 654 at random without saying how; here the halves are a permutation drawn with ``split_seed``,
    the same on every machine. They are computed, never written into ``root``; :func:`write_halves` writes them where
    you want. Training scales, crops, flips and changes colours; evaluation pads, and never resizes.

    Targets: ``semseg`` int64 (H, W), 0 to 39; ``depth`` float32 (H, W), metres; ``normal`` float32 (3, H, W);
    ``edge`` float32 (2, H, W), see :func:`read_edges`. 255 is not to be counted in any of them.

    Args:
        task: ``semseg``, ``depth``, ``normal`` or ``edge``.
        root: Folder of the data set.
        size: (H, W) of the crop in training, and to which evaluation pads.
        split_seed: Divides the official test frames into val and test.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random views of the training samples.
        normalization: Of the images.
        verify: Read every file during setup; see :class:`DenseDataModule`.

    Raises:
        ConfigError: An option is out of range.
    """

    data_name: ClassVar[str] = "NYUD-v2"
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    expected_hashes: ClassVar[Mapping[str, str] | None] = {"val": "36252ced686579ae"}
    expected_counts: ClassVar[Mapping[str, int] | None] = {"train": 795, "val": 654}
    expected_image_size: ClassVar[Size | None] = (425, 560)

    def __init__(
        self,
        task: Literal["semseg", "depth", "normal", "edge"],
        root: Path,
        size: tuple[int, int] = (448, 576),
        split_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        normalization: Normalization = "imagenet",
        verify: bool = False,
    ) -> None:
        super().__init__(task, root, size, normalization, batch_size, eval_batch_size, num_workers, seed, verify)
        if split_seed < 0:
            raise ConfigError(f"data.init_args.split_seed is {split_seed}; it must not be negative.")
        self.split_seed = split_seed

    def read_splits(self) -> dict[Split, NamedDataset]:
        """Return the splits; see :meth:`DenseDataModule.read_splits`."""
        _reject_other_distributions(self.root)
        lists = {}
        for name in ("train", "val"):
            file = self.root / "gt_sets" / f"{name}.txt"
            lists[f"gt_sets/{name}.txt"] = ids = read_ids(file, self.data_name)
            check_list(file, self.data_name, ids, self.expected_count(name), self.expected_hash(name))
        check_disjoint(self.data_name, lists)
        check_present(self.data_name, self.root, lists, PLACES)
        train, held_out = lists.values()
        val, test = halves(held_out, self.split_seed)
        if not val:
            raise DataError(f"{self.data_name}: gt_sets/val.txt has {len(held_out)} id; two halves need at least 2.")
        kind, read, read_training = TASKS[self.task]
        frames = Frames(self.root, "images", ".png", self.expected_image_size, read, read_training, kind)
        view = View(self.size, self.normalization)
        return {
            "train": FrameDataset(frames, train, view, Augmentation(self.size), self.seed),
            "val": FrameDataset(frames, val, view),
            "test": FrameDataset(frames, test, view),
        }

    def facts(self) -> dict[str, Any]:
        """Return how the halves were drawn, and the options of training views."""
        return {"split_seed": self.split_seed, "dropped": {}, "augmentation": Augmentation(self.size).describe()}

    def pool_key(self) -> Hashable:
        """Return the seed of the halves: all four tasks see the same frames."""
        return self.split_seed


def write_halves(root: Path, folder: Path, split_seed: int = 0) -> None:
    """Write the lists ``val_nsc.txt`` and ``test_nsc.txt`` of a seed, and the seed, for use in other programs.

    Args:
        root: Folder of the data set.
        folder: Where to; may be ``root / "gt_sets"``.
        split_seed: As of :class:`NYUDDataModule`.

    Raises:
        DatasetNotFoundError: ``gt_sets/val.txt`` is missing.
        OutputExistsError: One of the files is there already.
    """
    names = ("val_nsc.txt", "test_nsc.txt", "nsc_split_seed.txt")
    for name in names:
        if (folder / name).exists():
            raise OutputExistsError(f"{folder / name} is there already; nothing is overwritten. Remove it first.")
    val, test = halves(read_ids(root / "gt_sets" / "val.txt", NYUDDataModule.data_name), split_seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(names, (val, test, [str(split_seed)]), strict=True):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _reject_other_distributions(root: Path) -> None:
    """Raise if a folder holds one of the two other archives by which NYUD-v2 goes round."""

    def instead(folder: str, suffix: str, expected: str = ".png") -> bool:
        return bool(stems(root / folder, suffix)) and not stems(root / folder, expected)

    other = None
    if instead("segmentation", ".mat") or instead("depth", ".mat", ".npy"):
        other = "the first ASTMT archive (segmentation and depth as .mat, 41 classes)"
    elif instead("images", ".jpg") or instead("edge", ".npy") or instead("normals", ".npy"):
        other = "the MTI-Net archive NYUD_MT.tgz (images as .jpg, edges and normals as .npy)"
    if other:
        raise DatasetNotFoundError(
            f"NYUD-v2: {root} is {other}; its maps differ from those that published scores stand on. "
            "Use NYUDv2.tar.gz of the InvPT repository (images, normals and edges as .png)."
        )
