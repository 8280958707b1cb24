"""Figures of a scale search. Matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from nscmerge.search.curve import Curve, MethodResult

COLUMNS = 4


def curves_figure(methods: Sequence[MethodResult]) -> Figure:
    """Return one panel per method with all curves over the scale, each on its own range, its choice marked.

    Criteria differ in unit, so a curve's best value is drawn at 0 and its worst at 1; the height is the square root of
    that share, because a ruined merge's losses would flatten everything else.
    """
    figure, panels = _panels(methods)
    for panel, entry in zip(panels, methods, strict=False):
        for curve in entry.curves.values():
            lams, heights = _scaled(curve)
            (line,) = panel.plot(lams, heights, label=curve.name, linewidth=1.2)
            if curve.chosen is not None:
                panel.axvline(curve.chosen, color=line.get_color(), linestyle=":", linewidth=1)
        panel.set_ylabel("best 0, worst 1 (root)", fontsize=7)
    _legend(figure, panels[0])
    return figure


def judged_figure(methods: Sequence[MethodResult]) -> Figure:
    """Return one panel per method with the judge's mean and worst task over the scale, and where each curve chose."""
    figure, panels = _panels(methods)
    for panel, entry in zip(panels, methods, strict=False):
        if entry.judged is None:
            continue
        lams = list(entry.judged.points)
        panel.plot(lams, [entry.judged.points[lam].total for lam in lams], color="black", label="mean")
        panel.plot(lams, [entry.judged.worst(lam) for lam in lams], color="grey", linewidth=0.8, label="worst task")
        for number, curve in enumerate(entry.curves.values()):
            if curve.chosen is not None:
                panel.axvline(curve.chosen, color=f"C{number}", linestyle=":", label=curve.name)
    _legend(figure, panels[0])
    return figure


def _panels(methods: Sequence[MethodResult]) -> tuple[Figure, list[Any]]:
    rows = math.ceil(len(methods) / COLUMNS)
    figure = Figure(figsize=(3.2 * min(COLUMNS, len(methods)), 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, min(COLUMNS, len(methods)), squeeze=False).flat)
    for panel, entry in zip(axes, methods, strict=False):
        panel.set_title(entry.name, fontsize=9)
        panel.set_xlabel("scale", fontsize=7)
        panel.tick_params(labelsize=7)
    for panel in axes[len(methods) :]:
        panel.set_axis_off()
    return figure, axes


def _legend(figure: Figure, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=7)


def _scaled(curve: Curve) -> tuple[list[float], list[float]]:
    totals = {lam: point.total for lam, point in curve.points.items() if math.isfinite(point.total)}
    if not totals:
        return [], []
    sign = -1.0 if curve.higher_is_better else 1.0
    low = min(sign * total for total in totals.values())
    span = max(sign * total for total in totals.values()) - low or 1.0
    return list(totals), [math.sqrt((sign * total - low) / span) for total in totals.values()]
