"""The scales that a search tries: a coarse grid, then a finer one around the best; ties go to the smaller scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from nscmerge.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Coarse scales ``start, start + step, ... <= stop``, then the best +- multiples of ``fine`` below ``step``.

    Computed in decimals, so that 0.1 + 0.2 is the 0.3 that a user would write. The step sizes are those of NSC
    (arXiv:2603.26317, supplement A.3), which publishes no range; 0.1 to 2.0 is ours.

    Args:
        start: Smallest coarse scale.
        stop: Largest one, included if a step meets it.
        step: Coarse step, > 0.
        fine: Fine step, > 0 and below ``step``; None does without the second stage.

    Raises:
        ConfigError: The grid is empty, or a number is not finite.
    """

    start: float = 0.1
    stop: float = 2.0
    step: float = 0.1
    fine: float | None = 0.01

    def __post_init__(self) -> None:
        numbers = (self.start, self.stop, self.step, self.fine or 1.0)
        if not all(map(math.isfinite, numbers)) or self.step <= 0 or self.start > self.stop:
            raise ConfigError(
                f"the grid from {self.start} to {self.stop} in steps of {self.step} has no point; expected finite "
                "numbers with start <= stop and step > 0. Set model.init_args.grid."
            )
        if self.fine is not None and not 0 < self.fine < self.step:
            raise ConfigError(
                f"the fine step {self.fine} is not between 0 and the coarse step {self.step}; set "
                "model.init_args.grid.fine, or null to do without."
            )

    def coarse(self) -> list[float]:
        """Return the coarse scales, ascending."""
        first, last, step = (Decimal(str(number)) for number in (self.start, self.stop, self.step))
        return [float(first + i * step) for i in range(int((last - first) / step) + 1)]

    def around(self, best: float) -> list[float]:
        """Return the fine scales around ``best``, itself left out: up to but not including the next coarse ones.

        They may leave the coarse range (0.1 has 0.01 below it), but not its sign.
        """
        if self.fine is None:
            return []
        centre, step, fine = (Decimal(str(number)) for number in (best, self.step, self.fine))
        count = math.ceil(step / fine) - 1
        points = [float(centre + i * fine) for i in range(-count, count + 1) if i != 0]
        return [point for point in points if point > 0 or self.start <= 0]


def best_scale(values: Mapping[float, float], higher_is_better: bool = False) -> float | None:
    """Return the scale with the lowest (or highest) finite value, the smallest of equals; None if none is finite."""
    sign = -1.0 if higher_is_better else 1.0
    finite = [(sign * value, scale) for scale, value in values.items() if math.isfinite(value)]
    return min(finite)[1] if finite else None
