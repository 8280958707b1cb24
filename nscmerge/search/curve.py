"""What a search found: one curve over the scale per method and criterion, the scale chosen by it, and warning signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nscmerge.candidates import ClosedForm
from nscmerge.search.criterion import Criterion, TaskValues
from nscmerge.search.grid import best_scale


@dataclass(frozen=True)
class Point:
    """One candidate by one criterion.

    Attributes:
        total: Mean over tasks; what scales are compared by.
        tasks: Measured value by task, in the criterion's unit.
        relative: What the total is the mean of.
    """

    total: float
    tasks: TaskValues
    relative: TaskValues

    @classmethod
    def of(cls, criterion: Criterion, values: TaskValues, experts: TaskValues, suffix: str = "") -> Point:
        """Return the point of a candidate's values, with those of each task's own expert to compare with."""
        return cls(criterion.total(values, experts, suffix), values, criterion.relative(values, experts, suffix))

    def as_json(self) -> dict[str, Any]:
        """Return total and values; what is not finite is null."""
        return {"total": number(self.total), "tasks": {task: number(value) for task, value in self.tasks.items()}}


@dataclass(frozen=True)
class Curve:
    """One method by one criterion.

    Attributes:
        name: Of the criterion, with the reading after a dot where it has several.
        higher_is_better: Its direction.
        points: By scale, ascending.
        expert: Every task's own expert.
        base: The plain base model, which is scale 0 of any method.
        label_free: Made without labels.
    """

    name: str
    higher_is_better: bool
    points: Mapping[float, Point]
    expert: Point
    base: Point
    label_free: bool = False

    @property
    def chosen(self) -> float | None:
        """The best scale; None if no value is finite."""
        return best_scale({lam: point.total for lam, point in self.points.items()}, self.higher_is_better)

    @property
    def non_finite(self) -> int:
        """Number of candidates that can never be chosen."""
        return sum(not math.isfinite(point.total) for point in self.points.values())

    def worst(self, lam: float) -> float:
        """Return the worst task's number at a scale; a NaN counts as worst."""
        values = self.points[lam].relative.values()
        if any(map(math.isnan, values)):
            return math.nan
        return min(values) if self.higher_is_better else max(values)

    def as_json(self) -> dict[str, Any]:
        """Return the chosen scale and all candidates."""
        return {
            "chosen": self.chosen,
            "non_finite": self.non_finite,
            "expert": self.expert.as_json(),
            "base": self.base.as_json(),
            "candidates": [{"lam": lam, **point.as_json()} for lam, point in self.points.items()],
        }


@dataclass(frozen=True)
class MethodResult:
    """All curves of one method.

    Attributes:
        name: Of its row.
        spec: What was merged.
        growth: |update at scale 1| over the mean |expert update|, Frobenius.
        curves: By name; each has a choice.
        judged: A criterion that nothing was chosen by: the choices of the others, scale 1, and ``judge_at``.
        judge_at: Scales among which the judge's own best is sought.
        signs: Sentences that call the choices into question.
    """

    name: str
    spec: ClosedForm
    growth: float
    curves: Mapping[str, Curve]
    judged: Curve | None = None
    judge_at: Sequence[float] = ()
    signs: Sequence[str] = field(default_factory=list)

    def choices(self) -> dict[str, float]:
        """Return the scale by what chose it; ``equal size``, ``scale 1`` and the judge's own best are there to compare.

        ``equal size`` makes the merged update as large as the mean expert's, and needs no data at all; ``oracle``
        knows the answers and is no method.
        """
        found = {name: curve.chosen for name, curve in self.curves.items()}
        chosen = {name: lam for name, lam in found.items() if lam is not None}
        if self.judged is not None:
            if (scale := equal_size(self.growth)) is not None:
                chosen["equal size"] = scale
            chosen["scale 1"] = 1.0
            tried = {lam: self.judged.points[lam].total for lam in self.judge_at if lam in self.judged.points}
            if (best := best_scale(tried, self.judged.higher_is_better)) is not None:
                chosen["oracle"] = best
        return chosen


def equal_size(growth: float) -> float | None:
    """Return the scale, to two digits, at which an update of this growth is as large as the mean expert's."""
    return float(f"{1 / growth:.2g}") if growth > 0 and math.isfinite(growth) else None


def number(value: float) -> float | None:
    """Return a finite value, or None, which JSON can hold."""
    return value if math.isfinite(value) else None
