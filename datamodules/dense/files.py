"""Reading images, maps and structures from disk; whatever is wrong with a file is said with its name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nscmerge.errors import DataError, DatasetNotFoundError

#: (H, W) in pixels.
Size = tuple[int, int]


class Pixels(Enum):
    """What an image file may hold, and the Pillow modes that say so; those for 16 bit changed between its releases."""

    RGB = ("8-bit RGB", ("RGB",))
    GREY = ("8-bit grey", ("L",))
    LABELS = ("8-bit labels, grey or palette", ("L", "P"))
    GREY16 = ("16-bit grey", ("I;16", "I;16L", "I;16B", "I;16N", "I"))

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return self.value[0]

    @property
    def modes(self) -> tuple[str, ...]:
        """Pillow's names for it."""
        return self.value[1]


def _missing(file: Path) -> DatasetNotFoundError:
    return DatasetNotFoundError(f"{file} is missing. Extract the data set's archive again, or correct the split list.")


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} cannot be read ({type(error).__name__}: {error}). It is truncated or not of its name's format; "
        "extract it again from the data set's archive."
    )


def check_size(file: Path, got: Size, expected: Size | None, whose: str = "its image") -> None:
    """Raise unless a map has the expected (H, W); None expects nothing.

    Raises:
        DataError: It has another size; names both.
    """
    if expected is not None and got != tuple(expected):
        raise DataError(
            f"{file} is {got[0]} x {got[1]} pixels (height x width), expected {expected[0]} x {expected[1]} as {whose}."
            " Use the unmodified files of the data set."
        )


def read_image(file: Path, pixels: Pixels, size: Size | None = None, whose: str = "its image") -> Image.Image:
    """Return a decoded image.

    Args:
        file: PNG or JPEG.
        pixels: What it must hold.
        size: The (H, W) that it must have; None takes any.
        whose: Whose size that is, for the message.

    Raises:
        DatasetNotFoundError: It is missing.
        DataError: It is truncated, of another bit depth or channel count, or of another size.
    """
    try:
        with Image.open(file) as image:
            mode, got = image.mode, (image.height, image.width)
            if mode in pixels.modes:
                image.load()
    except FileNotFoundError as error:
        raise _missing(file) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow reports broken chunks as SyntaxError
        raise _unreadable(file, error) from error
    if mode not in pixels.modes:
        raise DataError(
            f"{file} holds pixels of Pillow's mode {mode}, expected {pixels.words} ({' or '.join(pixels.modes)}). "
            "Use the unmodified files of the data set."
        )
    check_size(file, got, size, whose)
    return image


def image_size(file: Path) -> Size:
    """Return the (H, W) that an image's header states, without decoding it.

    Raises:
        DatasetNotFoundError: It is missing.
        DataError: The header cannot be read.
    """
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except FileNotFoundError as error:
        raise _missing(file) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from error


def pixel_array(image: Image.Image) -> NDArray[Any]:
    """Return an image's own writable pixels: (H, W) or (H, W, C), in its own depth."""
    return np.array(image)


def channels_first(array: NDArray[Any]) -> Tensor:
    """Return (C, H, W) of an (H, W) or (H, W, C) array, of the same dtype."""
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def read_array(file: Path, size: Size | None = None) -> NDArray[np.float32]:
    """Return a 2-D ``.npy`` array of real numbers as float32 (H, W).

    Raises:
        DatasetNotFoundError: It is missing.
        DataError: It is truncated, not 2-D, not real numbers, or of another size.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise _missing(file) from error
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        shape, dtype = getattr(array, "shape", "no shape"), getattr(array, "dtype", type(array).__name__)
        raise DataError(f"{file} holds an array of shape {shape} and type {dtype}; expected numbers (H, W).")
    check_size(file, array.shape, size)
    return array.astype(np.float32)


def read_mat(file: Path, variable: str) -> Any:
    """Return one variable of a MATLAB file of version 7 or older.

    Raises:
        DatasetNotFoundError: The file is missing.
        DataError: It cannot be parsed, or has no such variable.
    """
    from scipy.io import loadmat

    try:
        variables = loadmat(str(file), variable_names=[variable])
    except FileNotFoundError as error:
        raise _missing(file) from error
    except Exception as error:  # a foreign parser on bytes that may be anything
        raise _unreadable(file, error) from error
    if variable not in variables:
        raise DataError(f"{file} has no variable '{variable}'. Use the unmodified files of the data set.")
    return variables[variable]
