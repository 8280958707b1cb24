"""Small drawings whose content is their label: white shapes on a colour, of unequal aspect ratios."""

from __future__ import annotations

import io
import random
from typing import Any

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("square", "circle", "triangle")
#: Width and height in pixels; none is square.
SIZES = ((40, 30), (30, 48), (64, 36), (34, 32))


def draw(colour: str, shape: str = "square", number: int = 1, index: int = 0, grey: bool = False) -> Any:
    """Return a ``PIL.Image``: a coloured ground with white shapes on it.

    Args:
        colour: Key of :data:`COLOURS`; the ground, which even a tiny model sees.
        shape: One of :data:`SHAPES`.
        number: How many shapes, side by side.
        index: Which of :data:`SIZES`.
        grey: Make it a picture of one channel.
    """
    from PIL import Image, ImageDraw

    width, height = SIZES[index % len(SIZES)]
    image = Image.new("RGB", (width, height), COLOURS[colour])
    pen = ImageDraw.Draw(image)
    side = min(width // (number + 1), height // 2)
    top = (height - side) // 2
    for n in range(number):
        left = (n + 1) * width // (number + 1) - side // 2
        box = (left, top, left + side, top + side)
        if shape == "circle":
            pen.ellipse(box, fill="white")
        elif shape == "triangle":
            pen.polygon([(left, top + side), (left + side // 2, top), (left + side, top + side)], fill="white")
        else:
            pen.rectangle(box, fill="white")
    return image.convert("L") if grey else image


def png(image: Any) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def turns(size: int, *key: object) -> list[int]:
    """Return 0 to ``size`` less one in an order that the key alone decides."""
    order = list(range(size))
    random.Random(" ".join(map(str, key))).shuffle(order)
    return order


def pick(names: Any, index: int) -> str:
    """Return the name at an index, counted round and round."""
    listed = list(names)
    return str(listed[index % len(listed)])
