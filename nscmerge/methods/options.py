"""Checks of method options that several methods share: what was got, what was expected."""

from __future__ import annotations

from collections.abc import Sequence

from nscmerge.errors import MethodError
from nscmerge.naming import nearest


def check_number(method: str, name: str, value: object, interval: str) -> float:
    """Return ``value`` if it is a number inside ``interval``, written as in ``(0, 1]`` or ``[0, 1)``.

    Raises:
        MethodError: A bool, no number, NaN, or outside.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, int | float) and not isinstance(value, bool):
        above = value > low or (interval[0] == "[" and value == low)
        below = value < high or (interval[-1] == "]" and value == high)
        if above and below:
            return value
    raise MethodError(f"{method}: {name} is {value!r}; expected a number in {interval}.")


def check_whole(method: str, name: str, value: object, at_least: int | None = None) -> int:
    """Return ``value`` if it is a whole number, not below ``at_least``.

    Raises:
        MethodError: A bool, no whole number, or too small.
    """
    if isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least):
        return value
    bound = "" if at_least is None else f" >= {at_least}"
    raise MethodError(f"{method}: {name} is {value!r}; expected a whole number{bound}.")


def check_switch(method: str, name: str, value: object) -> bool:
    """Return ``value`` if it is true or false.

    Raises:
        MethodError: Anything else, 0 and 1 included.
    """
    if isinstance(value, bool):
        return value
    raise MethodError(f"{method}: {name} is {value!r}; expected True or False.")


def check_choice(method: str, name: str, value: object, known: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``known``.

    Raises:
        MethodError: It is not; the message names the nearest one and lists all.
    """
    if isinstance(value, str) and value in known:
        return value
    near = nearest(value, known) if isinstance(value, str) else ""
    raise MethodError(f"{method}: {name} is {value!r}{near or ';'} expected one of {', '.join(map(repr, known))}.")
