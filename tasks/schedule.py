"""Learning rate over the steps of a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["linear", "cosine", "poly"]


def schedule_factor(schedule: Schedule, total: int, warmup: float, power: float = 0.9) -> Callable[[int], float]:
    """Return the factor of the peak learning rate by step, 0 to ``total`` - 1.

    Args:
        schedule: ``linear`` falls to 0 from the end of the warm-up on, ``cosine`` too, along half a cosine; ``poly`` is
            (1 - step / total)^power over all steps (sel-update-mtl), whatever the warm-up.
        total: Number of steps.
        warmup: Share of them in which the factor rises linearly from 0.
        power: Of ``poly``.
    """
    rise = max(1, round(warmup * total))

    def linear(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))

    def cosine(step: int) -> float:
        done = min(1.0, max(0.0, (step - rise) / max(1, total - rise)))
        return min((step + 1) / rise, (1 + math.cos(math.pi * done)) / 2)

    def poly(step: int) -> float:
        return min((step + 1) / rise, max(0.0, 1 - step / total) ** power)

    return {"linear": linear, "cosine": cosine, "poly": poly}[schedule]
