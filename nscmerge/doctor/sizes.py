"""Updates that are far too small or too large beside the others, and updates that are one and the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import sqrt
from statistics import median, median_high, median_low

import torch

from nscmerge.adapters import Adapter
from nscmerge.doctor.findings import Finding
from nscmerge.doctor.intake import Candidate
from nscmerge.doctor.overlap import Survey

#: A norm below this share of the others' median hardly counts in a merge.
NEAR_ZERO = 1e-3
#: A norm or scaling this many times larger or smaller than the others' median is an outlier.
OUTLIER = 10.0
#: Two updates are the same if they differ by this share of the norm at most (fp32 arithmetic on the way) ...
SAME = 1e-5
#: ... or by this many units of rounding of the coarser stored dtype: fp16 0.4 %, bf16 3 %. Two factorisations of one
#: update, each rounded once, differ by about half a unit.
ROUNDINGS = 4
#: Two updates of one direction, at whatever size.
PARALLEL = 0.99


def check_sizes(candidates: Sequence[Candidate], survey: Survey) -> Iterator[Finding]:
    """Yield near-zero updates, and outliers in norm or scaling, each against the median of the others.

    Norms are root mean squares over an adapter's own layers, so that one with fewer layers is not small for that.
    """
    layers = {c.name: c.adapter.layers for c in candidates if c.adapter is not None and survey.norms.get(c.name)}
    norms = {name: survey.norm(name) / sqrt(len(survey.norms[name])) for name in layers}
    norms = {name: norm for name, norm in norms.items() if norm > 0}
    small = {name: share for name, share in _to_others(norms).items() if share < NEAR_ZERO}
    for name, share in small.items():
        found = f"The update's norm per layer is {norms[name]:.2e}, {share:.1e} of the others' median."
        yield Finding("near-zero-update", found, (name,))
    sound = {name: norm for name, norm in norms.items() if name not in small}
    for name, share in _outliers(sound).items():
        found = f"The update's norm per layer is {norms[name]:.2e}, {_times(share)} the others' median."
        yield Finding("norm-outlier", found, (name,))
    scalings = {name: median(abs(factors.scaling) for factors in own.values()) for name, own in layers.items()}
    for name, share in _outliers({name: s for name, s in scalings.items() if s > 0}).items():
        found = f"The scaling s (alpha / r) is {scalings[name]:g}, {_times(share)} the others' median."
        yield Finding("scaling-outlier", found, (name,))


def _to_others(values: Mapping[str, float]) -> dict[str, float]:
    """Return every value over the median of the others; nothing for a single one.

    Of an even number of others any value between the two middle ones is a median, so the nearest of these counts: of
    1, 1 and 50 only the 50 is off.
    """
    shares = {}
    for name, value in values.items() if len(values) > 1 else ():
        others = [v for other, v in values.items() if other != name]
        shares[name] = value / min(max(value, median_low(others)), median_high(others))
    return shares


def _outliers(values: Mapping[str, float]) -> dict[str, float]:
    """Return by how much the outliers are off. Of two values only the larger is told, being the reciprocal."""
    off = {name: share for name, share in _to_others(values).items() if share > OUTLIER or share < 1 / OUTLIER}
    return {name: share for name, share in off.items() if share > 1} if len(values) == 2 else off


def _times(share: float) -> str:
    return f"{share:.1f} times" if share > 1 else f"1 / {1 / share:.1f} of"


def check_duplicates(candidates: Sequence[Candidate], survey: Survey) -> Iterator[Finding]:
    """Yield pairs whose updates are equal within rounding, however they are factorised, or point the same way."""
    adapters = {c.name: c.adapter for c in candidates if c.adapter is not None}
    for first, second in combinations(adapters, 2):
        a, b = adapters[first], adapters[second]
        if (a.sha256 and a.sha256 == b.sha256) or (distance := survey.distance(first, second)) is None:
            continue
        cosine = survey.overlaps[first, second].cosine
        if distance <= max(SAME, ROUNDINGS * _rounding(a), ROUNDINGS * _rounding(b)):
            found = f"The updates are the same within rounding (relative difference {distance:.1e}), in other files."
            yield Finding("duplicate-update", found, (first, second))
        elif cosine is not None and cosine > PARALLEL:
            ratio = survey.norm(first) / survey.norm(second)
            found = f"The updates point the same way (cosine {cosine:.4f}), the first {ratio:.3g} times as large."
            yield Finding("parallel-updates", found, (first, second))


def _rounding(adapter: Adapter) -> float:
    """Return the unit of rounding of the coarsest dtype among an adapter's factors."""
    return max((torch.finfo(t.dtype).eps for f in adapter.layers.values() for t in (f.A, f.B)), default=0.0)
