"""Options that several methods share, checked before any work."""

from __future__ import annotations

import math
from typing import Any, Literal

from nscmerge.errors import MethodError

#: What becomes of the entries that agree in sign: their mean, or their sum.
Agg = Literal["mean", "sum"]


def check_density(method: str, density: Any) -> None:
    """Raise unless ``density`` is a number in (0, 1], the share of entries kept.

    Raises:
        MethodError: It is not.
    """
    if not _is_number(density) or not 0 < density <= 1:
        raise MethodError(
            f"method '{method}': density is {density!r}; expected a number in (0, 1], the share of entries kept "
            "(0.2 keeps a fifth, 1 all)."
        )


def check_drop(method: str, drop: Any) -> None:
    """Raise unless ``drop`` is a number in [0, 1), the chance of an entry to be dropped.

    Raises:
        MethodError: It is not.
    """
    if not _is_number(drop) or not 0 <= drop < 1:
        raise MethodError(
            f"method '{method}': drop is {drop!r}; expected a number in [0, 1), the chance of an entry to be dropped "
            "(1 would leave nothing to rescale; 0.9 is usual, 0 drops none)."
        )


def check_agg(method: str, agg: Any) -> None:
    """Raise unless ``agg`` is ``mean`` or ``sum``.

    Raises:
        MethodError: It is not.
    """
    if agg not in ("mean", "sum"):
        raise MethodError(f"method '{method}': agg is {agg!r}; expected 'mean' or 'sum' of the entries that agree.")


def check_seed(method: str, seed: Any) -> None:
    """Raise unless ``seed`` is a whole number; 0 is one like any other.

    Raises:
        MethodError: It is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MethodError(f"method '{method}': seed is {seed!r}; expected a whole number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
