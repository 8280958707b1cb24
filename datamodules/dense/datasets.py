"""An image and one label map per id, padded to one size; training draws a random view of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from datamodules.base import TARGET, LabelledDataset, Sample
from datamodules.dense.files import Pixels, Size, channels_first, check_size, image_size, pixel_array, read_image
from datamodules.dense.labels import LabelKind
from datamodules.dense.transforms import Augmentation, Draws, View
from nscmerge.errors import DataError

#: Reads one label map: root, id, (H, W) of its image -> float32 (C, H, W).
ReadLabel = Callable[[Path, str, Size], Tensor]


@dataclass(frozen=True)
class Frames:
    """Where the frames of a data set are and how their labels are read.

    Args:
        root: Folder of the data set.
        images: Folder of the images in it.
        suffix: Of the image files.
        size: (H, W) that every image must have; None takes any.
        read_label: Reads the label map that is evaluated with.
        read_training_label: Reads the one that is trained on.
        kind: What both are.
    """

    root: Path
    images: str
    suffix: str
    size: Size | None
    read_label: ReadLabel
    read_training_label: ReadLabel
    kind: LabelKind

    def file(self, name: str) -> Path:
        """Return the image file of an id."""
        return self.root / self.images / f"{name}{self.suffix}"

    def image(self, name: str) -> Tensor:
        """Return an image, uint8 (3, H, W)."""
        return channels_first(pixel_array(read_image(self.file(name), Pixels.RGB, self.size, "the data set's images")))


class NamedDataset(LabelledDataset):
    """Samples that have names, by which a result can say what it was made from."""

    #: One per sample, in order.
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


class FrameDataset(NamedDataset):
    """``x`` float32 (3, H, W), normalised and padded; ``target`` in the form of its kind.

    With an augmentation, reading a whole sample draws a new random view each time; ``inputs`` and ``target`` read apart
    are always the plain one, so that they fit together.

    Args:
        frames: Where and what.
        ids: Which of them, in this order.
        view: Padding and normalisation.
        augmentation: Of training; None for splits that are evaluated.
        seed: Of the training draws.
    """

    def __init__(
        self, frames: Frames, ids: Sequence[str], view: View, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.frames, self.ids, self.view, self.augmentation = frames, list(ids), view, augmentation
        self._draws = Draws(seed)

    def inputs(self, index: int) -> Sample:
        """Return ``x`` alone.

        Raises:
            DataError: The image cannot be used, or is larger than what it is padded to.
        """
        name = self.ids[index]
        image = self.frames.image(name)
        self._check_fits(name, (image.shape[1], image.shape[2]))
        return {"x": self.view.image(image)}

    def target(self, index: int) -> Tensor:
        """Return the target alone; of the image, reads the header only.

        Raises:
            DataError: The label cannot be used or does not fit its image.
        """
        name = self.ids[index]
        size = image_size(self.frames.file(name))
        check_size(self.frames.file(name), size, self.frames.size, "the data set's images")
        self._check_fits(name, size)
        return self.view.label(self.frames.read_label(self.frames.root, name, size), self.frames.kind)

    def __getitem__(self, index: int) -> Sample:
        if self.augmentation is None:
            return super().__getitem__(index)
        name, kind = self.ids[index], self.frames.kind
        image = self.frames.image(name)
        label = self.frames.read_training_label(self.frames.root, name, (image.shape[1], image.shape[2]))
        image, label = self.augmentation(image, label, kind, self._draws(index))
        return {"x": self.view.image(image), TARGET: self.view.label(label, kind)}

    def _check_fits(self, name: str, size: Size) -> None:
        if size[0] > self.view.size[0] or size[1] > self.view.size[1]:
            raise DataError(
                f"{self.frames.file(name)} is {size[0]} x {size[1]} pixels (height x width), larger than the "
                f"{self.view.size[0]} x {self.view.size[1]} that evaluation pads to. Raise data.init_args.size."
            )
