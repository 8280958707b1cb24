"""Image classification for CLIP: the twenty data sets of FusionBench, which NUFILT and NSC merge on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import LabelledDataset, Sample, Split
from datamodules.images import ImageTransform, image_root, read_image
from datamodules.sources import DatasetSpec, Part, Place, RandomSplit, Source, Table
from datamodules.sources.module import SourceDataModule
from datamodules.tokenizer import load_pretrained
from nscmerge.errors import ConfigError, DataError

#: Published names of a validation split, and of the split that scores are computed on.
VALIDATION = ("validation", "valid", "val")
TEST = ("test",)


@dataclass(frozen=True)
class CLIPTask:
    """One data set.

    Attributes:
        place: Where it is published.
        classes: Number of classes; labels are 0 to that less one, in the order of the class names.
        scored: Names of the published split that scores are computed on.
    """

    place: Place
    classes: int
    scored: tuple[str, ...] = TEST


#: In the order of FusionBench, in which the first 8 and 14 are suites of their own.
CLIP_TASKS: dict[str, CLIPTask] = {
    "sun397": CLIPTask(Place("tanganke/sun397"), 397),
    "stanford-cars": CLIPTask(Place("tanganke/stanford_cars"), 196),
    "resisc45": CLIPTask(Place("tanganke/resisc45"), 45),
    "eurosat": CLIPTask(Place("tanganke/eurosat"), 10),
    "svhn": CLIPTask(Place("ufldl-stanford/svhn", "cropped_digits"), 10),
    "gtsrb": CLIPTask(Place("tanganke/gtsrb"), 43),
    "mnist": CLIPTask(Place("ylecun/mnist"), 10),
    "dtd": CLIPTask(Place("tanganke/dtd"), 47),
    "oxford_flowers102": CLIPTask(Place("dpdl-benchmark/oxford_flowers102"), 102),
    "pcam": CLIPTask(Place("1aurent/PatchCamelyon"), 2),
    "fer2013": CLIPTask(Place("clip-benchmark/wds_fer2013"), 7),
    "oxford-iiit-pet": CLIPTask(Place("timm/oxford-iiit-pet"), 37),
    "stl10": CLIPTask(Place("tanganke/stl10"), 10),
    "cifar100": CLIPTask(Place("tanganke/cifar100"), 100),
    "cifar10": CLIPTask(Place("tanganke/cifar10"), 10),
    # its test split is published as "validation"
    "food101": CLIPTask(Place("ethz/food101"), 101, scored=("validation", "test")),
    "fashion_mnist": CLIPTask(Place("zalando-datasets/fashion_mnist"), 10),
    "emnist_letters": CLIPTask(Place("tanganke/emnist_letters"), 26),
    "kmnist": CLIPTask(Place("tanganke/kmnist"), 10),
    "rendered-sst2": CLIPTask(Place("nateraw/rendered-sst2"), 2),
}


def clip_spec(task: str, cut: RandomSplit | None) -> DatasetSpec:
    """Return the spec of one data set.

    Args:
        task: Key of :data:`CLIP_TASKS`.
        cut: How train is divided into ours and validation; None where validation is published on its own.
    """
    known = CLIP_TASKS[task]
    splits: dict[Split, Part] = {
        "train": Part("train", cut=cut, side=0),
        "val": Part("train", cut=cut, side=1) if cut else Part(VALIDATION),
        "test": Part(known.scored),
    }
    columns = {
        "image": ("image", "img", "jpg", "png", "webp"),
        "label": ("label", "labels", "fine_label", "fine_labels", "cls"),
    }
    return DatasetSpec(task, [known.place], columns, splits)


class ImagesOfClasses(LabelledDataset):
    """``pixel_values`` float32 (3, H, W), and ``target`` int64, scalar.

    Args:
        table: Rows with ``image`` and ``label``.
        classes: Number of classes.
        transform: What CLIP sees of an image.
        root: Folder of relative paths of images.

    Raises:
        DataError: A label is no class.
    """

    def __init__(self, table: Table, classes: int, transform: ImageTransform, root: Path | None = None) -> None:
        self.labels = torch.tensor(class_labels(table, classes))
        self.table, self.transform, self.root = table.undecoded("image"), transform, root

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: int) -> Sample:
        """Return the pixels of an image."""
        image = read_image(self.table[index]["image"], f"{self.table.where}, row {index}", self.root)
        return {"pixel_values": self.transform(image)}

    def target(self, index: int) -> Tensor:
        """Return the class of an image; decodes nothing."""
        return self.labels[index]


def class_labels(table: Table, classes: int) -> list[int]:
    """Return the class of every row: a number, a truth value, or the folder name where folders are numbered.

    Raises:
        DataError: A label is missing, no whole number, or not below ``classes``.
    """
    labels = table.column("label")
    names = table.class_names("label")
    if names is not None and all(name.isdigit() for name in names):
        # Folders "0", "1", "10", "2" are counted in the order of text; their names are the classes.
        labels = [int(names[label]) if isinstance(label, int) and label >= 0 else label for label in labels]
    elif names is not None and len(names) != classes:
        raise DataError(f"{table.where} names {len(names)} classes ({', '.join(names[:5])}, ...); expected {classes}.")
    read = []
    for row, label in enumerate(labels):
        number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdigit()) else -1
        if not 0 <= number < classes:
            raise DataError(f"{table.where}, row {row}: its label is {label!r}; expected 0 to {classes - 1}.")
        read.append(number)
    return read


class CLIPDataModule(SourceDataModule):
    """One of the twenty sets; images as the checkpoint's own processor has them, with Pillow.

    Validation is the published split of that name; where there is none, or it is what scores are computed on, the last
    tenth of a random split of train (seed 0), which training then leaves out.

    Args:
        task: Key of :data:`CLIP_TASKS`.
        processor: Folder or hub id of the base model, whose image processor is used.
        source: Folder or hub id of the data; None takes the published ones. A folder may hold one folder of images per
            class in each of ``train`` and ``test``; classes are then counted in the order of their names.
        val_fraction: Share of train that validation gets where it is cut from there.
        val_max: At most so many of them; NSC takes 5000, FusionBench all.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: The task is unknown, or the fraction is not between 0 and 1.
    """

    def __init__(
        self,
        task: str,
        processor: str = "openai/clip-vit-base-patch32",
        source: str | None = None,
        val_fraction: float = 0.1,
        val_max: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in CLIP_TASKS:
            raise ConfigError(f"no image data set '{task}'; known: {', '.join(CLIP_TASKS)}.")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction is {val_fraction}; expected a share between 0 and 1.")
        self._cut = RandomSplit(val_fraction, at_most=val_max)
        super().__init__(clip_spec(task, self._cut), source, batch_size, eval_batch_size, num_workers, seed)
        self.task, self.processor = task, processor
        self._transform: ImageTransform | None = None

    def prepare_data(self) -> None:
        """Fetch data and processor, so that one process alone fills the cache."""
        super().prepare_data()
        load_pretrained("AutoImageProcessor", self.processor)

    def setup(self, stage: str | None = None) -> None:
        """Open the data and the image processor; a split is read when it is asked for."""
        super().setup(stage)
        if self._transform is None and self._opened is not None:
            self._transform = ImageTransform.of(load_pretrained("AutoImageProcessor", self.processor))
            own = [name for name in VALIDATION if name not in CLIP_TASKS[self.task].scored]
            if self._opened.published(own):
                self._opened.spec = clip_spec(self.task, None)

    def read(self, opened: Source, split: Split) -> Dataset[Sample]:
        """Return one split."""
        if self._transform is None:
            raise ConfigError(f"{self.task}: the '{split}' split is not open yet; call setup() first.")
        classes = CLIP_TASKS[self.task].classes
        return ImagesOfClasses(opened.split(split), classes, self._transform, image_root(opened))

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data."""
        return {**super().describe(), "task": self.task}
