"""Progress of long loops: the core says what it loops over, whoever calls it decides whether that is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Watch(Protocol):
    """Wraps a loop: yields the same items, and may show how far it is."""

    def __call__(self, items: Iterable[T], label: str) -> Iterable[T]:
        """Return an iterable over ``items``; ``label`` says what is being done."""
        ...


def quiet(items: Iterable[T], label: str) -> Iterable[T]:
    """Return the items as they are."""
    return items
