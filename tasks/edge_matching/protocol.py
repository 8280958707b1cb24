"""What is counted: matching distance, thresholds, suppression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nscmerge.errors import ConfigError

#: Thresholds by their number: 101 and 99 are those of published protocols, 19 serve while developing.
PRESETS: dict[int, tuple[float, ...]] = {
    101: (0.001, *(k / 100 for k in range(1, 100)), 0.999),
    99: tuple(k / 100 for k in range(1, 100)),
    19: tuple(k / 20 for k in range(1, 20)),
}


@dataclass(frozen=True)
class Protocol:
    """How one image is counted; build it with :meth:`of`.

    Attributes:
        max_dist: Largest distance of a matched pair, as a share of the image's diagonal.
        thresholds: Ascending; a pixel is an edge where its strength is above.
        nms: Whether strengths are thinned by non-maximum suppression first.
    """

    max_dist: float
    thresholds: tuple[float, ...]
    nms: bool = True

    @classmethod
    def of(cls, max_dist: float, thresholds: int | Sequence[float] = 101, nms: bool = True) -> Protocol:
        """Return a checked protocol.

        Args:
            max_dist: 0.0075 for PASCAL-Context, 0.011 for NYUD-v2.
            thresholds: 101 (0.001, 0.01 to 0.99, 0.999), 99 (0.01 to 0.99), 19 (0.05 to 0.95), or a list of them.
            nms: Whether strengths are thinned by non-maximum suppression first.

        Raises:
            ConfigError: A number of thresholds that is no preset, thresholds that do not ascend within [0, 1), or a
                distance that is not positive.
        """
        if not (math.isfinite(max_dist) and max_dist > 0):
            raise ConfigError(f"max_dist is {max_dist}; expected a positive share of the diagonal, such as 0.0075.")
        if isinstance(thresholds, int):
            if thresholds not in PRESETS:
                raise ConfigError(
                    f"thresholds is {thresholds}; expected one of {sorted(PRESETS)}, or a list of values."
                )
            return cls(max_dist, PRESETS[thresholds], nms)
        values = tuple(map(float, thresholds))
        # NaN fails every comparison, so this also finds one.
        if not values or not all(0 <= t < 1 for t in values) or not all(a < b for a, b in pairwise(values)):
            raise ConfigError(f"thresholds are {list(values)}; expected values in [0, 1) that ascend.")
        return cls(max_dist, values, nms)

    def radius(self, shape: tuple[int, int]) -> float:
        """Return the matching distance in pixels for an image of ``shape`` (H, W)."""
        return self.max_dist * math.hypot(*shape)
