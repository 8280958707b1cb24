"""A mapping whose values are computed when asked for, so that a dense merge never lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """``{name: compute(name)}``; nothing is kept, so every access computes anew and gives the same.

    Args:
        names: The keys, in order.
        compute: A pure function of the name.
    """

    def __init__(self, names: Sequence[str], compute: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
