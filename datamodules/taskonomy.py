"""Taskonomy's tiny split as eleven dense tasks (Zamir et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import TARGET, Sample, Split
from datamodules.dense.datasets import NamedDataset
from datamodules.dense.files import Pixels, Size, check_size, image_size, read_image
from datamodules.dense.module import SPLITS, DenseDataModule
from datamodules.dense.taskonomy_index import domain_folder, join_views, read_buildings, view_file
from datamodules.dense.taskonomy_maps import DOMAINS, RGB, Domain, flip, read_target, resize
from datamodules.dense.transforms import Draws, Normalization, normalize
from nscmerge.errors import ConfigError, DataError


class TaskonomyDataset(NamedDataset):
    """``x`` float32 (3, H, W), normalised; ``target`` float32 (C, H, W), both resized, bilinear.

    With a flip probability, reading a whole sample mirrors both at random; ``inputs`` and ``target`` read apart are
    always the plain ones, so that they fit together.

    Args:
        root: Folder of the data set.
        views: (building, view) of each sample.
        domain: What the target is.
        original: (H, W) that every file must have; None takes any, the same for all of a view.
        size: (H, W) of the sample.
        normalization: Of the image.
        flip: Probability of mirroring left to right.
        negate_x: Whether mirroring turns the x of normals.
        seed: Of the training draws.
    """

    def __init__(
        self,
        root: Path,
        views: Sequence[tuple[str, str]],
        domain: Domain,
        original: Size | None,
        size: Size,
        normalization: Normalization,
        flip: float = 0.0,
        negate_x: bool = True,
        seed: int = 0,
    ) -> None:
        self.ids = [f"{building}/{view}" for building, view in views]
        self.domain, self.original, self.size, self.normalization = domain, original, size, normalization
        self.flip, self.negate_x = flip, negate_x
        self._folders = {name: domain_folder(root, name) for name in {RGB, domain.name, DOMAINS["dz"].name}}
        self._draws = Draws(seed)

    def file(self, index: int, domain: str) -> Path:
        """Return the file of a sample in one domain."""
        building, view = self.ids[index].split("/")
        return view_file(self._folders[domain], building, view, domain)

    def inputs(self, index: int) -> Sample:
        """Return ``x`` alone."""
        image = read_image(self.file(index, RGB), Pixels.RGB, self.original, "the data set's images")
        return {"x": normalize(torch.from_numpy(resize(image, self.size)).to(torch.uint8), self.normalization)}

    def target(self, index: int) -> Tensor:
        """Return the target alone; of the image, reads the header only."""
        file = self.file(index, RGB)
        size = image_size(file)
        check_size(file, size, self.original, "the data set's images")
        return torch.from_numpy(read_target(self.domain, lambda name: self.file(index, name), size, self.size))

    def __getitem__(self, index: int) -> Sample:
        sample = {**self.inputs(index), TARGET: self.target(index)}
        if self.flip and self._draws(index).random() < self.flip:
            mirrored = flip(sample[TARGET].numpy(), self.negate_x and self.domain.directed)
            sample = {"x": sample["x"].flip(-1), TARGET: torch.from_numpy(mirrored)}
        return sample


class TaskonomyDataModule(DenseDataModule):
    """Taskonomy, tiny split: buildings to train, to validate, and ``ihlen`` to test, as the NSC paper does.

    Layout: ``<domain>/taskonomy/<building>/point_<P>_view_<V>_domain_<domain>.png`` (Omnidata's download), or the same
    without ``taskonomy`` (MultiMAE's); ``splits_taskonomy/train_val_test_tiny.csv`` with columns id, train, val, test.
    Domains are joined by building, point and view; a view that one of them lacks is dropped from all tasks, and counted
    in :meth:`describe`. ``woodbine`` is not in the download and ``wiconisco`` lacks texture edges: both are left out.
    The counts of the paper are 35,774 to validate and 9,007 to test; another count is a warning.
    Everything is resized to ``size``; training mirrors at random. Targets are scaled as Taskonomy's own code does it,
    see ``datamodules.dense.taskonomy_maps``, on which the L1 of published tables stands.

    Targets, all float32: ``de``, ``dz`` (2, H, W), the second channel 1 where depth is known; ``n``, ``r`` (3, H, W);
    ``c`` (2, H, W); the others (1, H, W). Normals have x right, y down, z forward, and face the camera.

    Args:
        task: ``de``, ``dz`` Euclidean and z-buffer depth; ``eo``, ``et`` occlusion and texture edges; ``k2``, ``k3``
            key points; ``n`` normals; ``c`` curvature; ``r`` reshading; ``s2``, ``s25`` segments.
        root: Folder of the data set.
        size: (H, W) to which images and labels are resized.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random flips of the training samples.
        flip_normals: Whether mirroring turns the x of normals; the family's code forgets it.
        join: ``all`` keeps views that all eleven tasks have, so that their samples are the same; ``task`` asks for this
            task's files alone.
        normalization: Of the images.
        verify: Read every file during setup; see :class:`DenseDataModule`.

    Raises:
        ConfigError: An option is out of range.
    """

    data_name: ClassVar[str] = "Taskonomy"
    tasks: ClassVar[tuple[str, ...]] = tuple(DOMAINS)
    expected_counts: ClassVar[Mapping[str, int] | None] = {"train": 259747, "val": 35774, "test": 9007}
    expected_image_size: ClassVar[Size | None] = (512, 512)
    #: Buildings of the split file to test on; None takes all.
    test_buildings: ClassVar[Sequence[str] | None] = ("ihlen",)
    skipped_buildings: ClassVar[frozenset[str]] = frozenset({"woodbine", "wiconisco"})

    def __init__(
        self,
        task: Literal["de", "dz", "eo", "et", "k2", "k3", "n", "c", "r", "s2", "s25"],
        root: Path,
        size: tuple[int, int] = (256, 256),
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        flip_normals: bool = True,
        join: Literal["all", "task"] = "all",
        normalization: Normalization = "half",
        verify: bool = False,
    ) -> None:
        super().__init__(task, root, size, normalization, batch_size, eval_batch_size, num_workers, seed, verify)
        if join not in ("all", "task"):
            raise ConfigError(f"data.init_args.join is '{join}'; use 'all' or 'task'.")
        self.flip_normals, self.join = flip_normals, join
        self._buildings: dict[Split, list[str]] = {}
        self._lacking: dict[str, dict[str, int]] = {}

    def read_splits(self) -> dict[Split, NamedDataset]:
        """Return the splits; see :meth:`DenseDataModule.read_splits`."""
        self._buildings = self._chosen_buildings()
        domains = self._domains()
        datasets: dict[Split, NamedDataset] = {}
        for split in SPLITS:
            joined, self._lacking[split] = join_views(self.root, self._buildings[split], domains, self.data_name)
            self._report(split, len(joined))
            datasets[split] = TaskonomyDataset(
                self.root,
                joined,
                DOMAINS[self.task],
                self.expected_image_size,
                self.size,
                self.normalization,
                flip=0.5 if split == "train" else 0.0,
                negate_x=self.flip_normals,
                seed=self.seed,
            )
        counts = ", ".join(f"{split} {len(dataset)}" for split, dataset in datasets.items())
        rank_zero_info(f"{self.data_name}, views: {counts}.")
        return datasets

    def facts(self) -> dict[str, Any]:
        """Return the buildings, how many views each domain lacks, and the options of training views."""
        return {
            "buildings": self._buildings,
            "skipped_buildings": sorted(self.skipped_buildings),
            "join": self.join,
            "dropped": {split: counts for split, counts in self._lacking.items() if counts},
            "augmentation": {"flip": 0.5, "flip_normals": self.flip_normals},
        }

    def pool_key(self) -> Hashable:
        """Return which views the task sees: the same for all tasks if all are joined."""
        return "all" if self.join == "all" else self._domains()

    def _domains(self) -> tuple[str, ...]:
        if self.join == "all":
            return RGB, *(domain.name for domain in DOMAINS.values())
        own = DOMAINS[self.task]
        return tuple(dict.fromkeys([RGB, own.name, *([DOMAINS["dz"].name] if own.masked else [])]))

    def _chosen_buildings(self) -> dict[Split, list[str]]:
        buildings = read_buildings(self.root, self.data_name)
        if self.test_buildings is not None:
            unknown = set(self.test_buildings) - set(buildings["test"])
            if unknown:
                raise DataError(
                    f"{self.data_name}: the split file has no test building '{sorted(unknown)[0]}'; it has "
                    f"{', '.join(buildings['test']) or 'none'}. Use the published tiny split."
                )
            buildings["test"] = list(self.test_buildings)
        chosen = {split: [b for b in names if b not in self.skipped_buildings] for split, names in buildings.items()}
        for split, names in chosen.items():
            if not names:
                raise DataError(f"{self.data_name}: the split file has no building for '{split}'.")
        return chosen

    def _report(self, split: Split, count: int) -> None:
        lacking = dict(self._lacking[split])
        dropped, expected = lacking.pop("views", 0), self.expected_count(split)
        if dropped:
            shown = ", ".join(f"{domain} {n}" for domain, n in lacking.items())
            rank_zero_warn(
                f"{self.data_name}: {dropped} views of '{split}' are dropped as incomplete; missing: {shown}."
            )
        if not count:
            raise DataError(f"{self.data_name}: no view of '{split}' is complete; compare the domains' file names.")
        if expected is not None and count != expected:
            rank_zero_warn(
                f"{self.data_name}: '{split}' has {count} views, the paper's {expected}; scores may not compare."
            )
