"""One primitive of a scene with all that is known of it."""

from __future__ import annotations

from typing import NamedTuple

from datamodules.scenes.kinds import KINDS, ROOM, Kind
from datamodules.scenes.primitives import Shape
from datamodules.scenes.textures import Texture


class Solid(NamedTuple):
    """A primitive, its colour and its labels.

    Attributes:
        shape: Geometry in world axes.
        texture: Colour.
        kind: Key of :data:`KINDS`.
        instance: Number of the object that it is part of; solids of one person share it, walls have one each.
        part: Name of a person's part as in PASCAL Parts (``head``, ``luarm``); empty for everything else.
        open: A hole: rays pass, there is no depth and no surface.
    """

    shape: Shape
    texture: Texture
    kind: str
    instance: int
    part: str = ""
    open: bool = False

    @property
    def labels(self) -> Kind:
        """Numbers of its kind in the three data sets."""
        return KINDS[self.kind]

    @property
    def is_room(self) -> bool:
        """Whether it belongs to the room rather than to what stands in it."""
        return self.kind in ROOM
