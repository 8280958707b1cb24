"""Image files to what a CLIP tower sees: read, resize, cut or pad, normalise, with Pillow as the published runs did."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.sources import Source
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

ImageMode = Literal["center_crop", "pad"]


def read_image(value: Any, where: str, root: Path | None = None) -> Any:
    """Return an RGB ``PIL.Image``, completely decoded.

    Args:
        value: An image of Pillow, encoded bytes, a path, or the ``{"bytes", "path"}`` of a Hugging Face data set.
        where: Data set and sample, for messages.
        root: Folder of relative paths.

    Raises:
        DatasetNotFoundError: The file is missing.
        DataError: There is no image, or it cannot be decoded.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        opened: Any = io.BytesIO(value)
    elif isinstance(value, str | Path):
        opened = root / value if root is not None else Path(value)
        if not opened.is_file():
            raise DatasetNotFoundError(f"{where}: its image {opened} is missing.")
    elif isinstance(value, Image.Image):
        opened = value
    else:
        raise DataError(f"{where}: expected an image, its bytes or its path, got {type(value).__name__}.")
    try:
        image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        return image.convert("RGB")  # decodes
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        name = opened if isinstance(opened, Path) else "its image"
        raise DataError(
            f"{where}: {name} cannot be decoded ({error}). It is damaged or no image; fetch it again or remove the row."
        ) from error


def image_root(opened: Source) -> Path | None:
    """Return the folder that relative paths of pictures start from; None for data from the hub."""
    if opened.place is not None:
        return None
    path = Path(opened.name)
    return path if path.is_dir() else path.parent


@dataclass(frozen=True)
class ImageTransform:
    """RGB images to float32 ``(3, H, W)``, normalised.

    Args:
        resize: Length of the shorter edge, or (height, width); None keeps the size.
        crop: (height, width) that is cut from the middle; None cuts nothing.
        mean: Per channel, of values in [0, 1].
        std: As ``mean``.
        resample: Pillow's number of the filter; 3 is bicubic.
        pad: First pad to a square with the mean colour, as the original LLaVA-1.5 does for its "pad" aspect ratio.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    pad: bool = False

    def __call__(self, image: Any) -> Tensor:
        """Return the pixels of an RGB ``PIL.Image``."""
        if self.pad:
            image = _to_square(image, tuple(int(255 * m) for m in self.mean))
        if self.resize is not None:
            image = image.resize(self._size(image.size), self.resample)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        width, height = size
        short, edge = min(width, height), int(self.resize or 0)
        # Truncated, not rounded, as transformers has it.
        return (edge, int(edge * height / short)) if width <= height else (int(edge * width / short), edge)

    @classmethod
    def of(cls, processor: Any, mode: ImageMode = "center_crop") -> ImageTransform:
        """Return what an image processor of transformers is set to, done by Pillow alone.

        Args:
            processor: Any that resizes, cuts from the middle, rescales and normalises, as CLIP's.
            mode: ``pad`` pads to a square first.

        Raises:
            ConfigError: The mode is unknown, or the processor does something else.
        """
        check_image_mode(mode)
        own = processor.to_dict()
        if abs(float(own.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-9 or own.get("do_rescale") is False:
            raise ConfigError(
                "the image processor scales pixels by something other than 1/255; only CLIP's is supported."
            )
        normalise = own.get("do_normalize", True)
        return cls(
            resize=_edge(own["size"]) if own.get("do_resize", True) else None,
            crop=_area(own["crop_size"]) if own.get("do_center_crop", True) else None,
            mean=tuple(own["image_mean"]) if normalise else (0.0, 0.0, 0.0),
            std=tuple(own["image_std"]) if normalise else (1.0, 1.0, 1.0),
            resample=int(own.get("resample", 3)),
            pad=mode == "pad",
        )


def check_image_mode(mode: str) -> None:
    """Refuse an unknown image mode.

    Raises:
        ConfigError: It is neither of the two.
    """
    if mode not in ("center_crop", "pad"):
        raise ConfigError(f"no image mode '{mode}'; use 'center_crop' or 'pad'.")


def _edge(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if size.get("shortest_edge"):
        return int(size["shortest_edge"])
    return _area(size)


def _area(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if not (size.get("height") and size.get("width")):
        raise ConfigError(f"the image processor's size is {size}; expected shortest_edge, or height and width.")
    return int(size["height"]), int(size["width"])


def _to_square(image: Any, colour: tuple[int, ...]) -> Any:
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cut from the middle; what is smaller is first padded with black, as transformers does."""
    have_h, have_w = pixels.shape[1:]
    if have_h < height or have_w < width:
        padded = pixels.new_zeros(3, max(have_h, height), max(have_w, width))
        top, left = -(-(padded.shape[1] - have_h) // 2), -(-(padded.shape[2] - have_w) // 2)
        padded[:, top : top + have_h, left : left + have_w] = pixels
        pixels, (have_h, have_w) = padded, padded.shape[1:]
    top, left = (have_h - height) // 2, (have_w - width) // 2
    return pixels[:, top : top + height, left : left + width]
