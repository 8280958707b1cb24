"""Learning rate over the steps of a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Schedule = Literal["linear", "poly"]


def schedule_factor(schedule: Schedule, total: int, warmup: float, power: float = 0.9) -> Callable[[int], float]:
    """Return the factor of the peak learning rate by step, 0 to ``total`` - 1.

    Args:
        schedule: ``linear`` falls to 0 from the end of the warm-up on; ``poly`` is (1 - step / total)^power over all
            steps (sel-update-mtl), whatever the warm-up.
        total: Number of steps.
        warmup: Share of them in which the factor rises linearly from 0.
        power: Of ``poly``.
    """
    rise = max(1, round(warmup * total))

    def linear(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))

    def poly(step: int) -> float:
        return min((step + 1) / rise, max(0.0, 1 - step / total) ** power)

    return linear if schedule == "linear" else poly
