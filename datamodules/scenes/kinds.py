"""What a solid can be, and which label each real data set's numbering gives it."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """Labels of one kind of solid.

    Attributes:
        nyud: Class 1..40 as in NYUD-v2's segmentation PNG (0 would be unlabelled).
        voc: Class 0..20 of PASCAL VOC; 0 is background.
        context: Category 1..459 of PASCAL-Context's LabelMap.
    """

    nyud: int
    voc: int
    context: int


#: Numbers as in the 40 class names of the NYUD evaluation code, VOC's 21 and ``context_classes.json``.
KINDS: dict[str, Kind] = {
    "wall": Kind(1, 0, 440),
    "floor": Kind(2, 0, 158),
    "ceiling": Kind(22, 0, 68),
    "window": Kind(9, 0, 454),
    "door": Kind(8, 0, 115),
    "picture": Kind(11, 0, 287),
    "curtain": Kind(16, 0, 105),
    "mirror": Kind(19, 0, 252),
    "television": Kind(25, 20, 427),
    "cabinet": Kind(3, 0, 46),
    "bed": Kind(4, 0, 18),
    "chair": Kind(5, 9, 72),
    "sofa": Kind(6, 18, 368),
    "table": Kind(7, 11, 397),
    "bookshelf": Kind(10, 0, 349),
    "fridge": Kind(24, 0, 170),
    "box": Kind(29, 0, 37),
    "rug": Kind(20, 0, 330),
    "pillow": Kind(18, 0, 290),
    "ball": Kind(40, 0, 10),
    "dog": Kind(40, 12, 113),
    "lamp": Kind(35, 0, 232),
    "bottle": Kind(40, 5, 34),
    "plant": Kind(40, 16, 308),
    "bin": Kind(39, 0, 418),
    "bag": Kind(37, 0, 9),
    "pillar": Kind(38, 0, 289),
    "person": Kind(31, 15, 284),
}
#: Kinds that make up the room itself; everything else is an object.
ROOM = ("wall", "floor", "ceiling", "window")
