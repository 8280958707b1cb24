"""Figures of a protocol's results. Matplotlib without a display."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.continual.results import Results


def curve_figure(results: Results) -> Figure:
    """Return the mean normalized score of the tasks seen so far after every step, one line per method."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20"]
    for number, name in enumerate(results.methods):
        curve = results.curve(name)
        steps = range(1, len(curve) + 1)
        means = np.array([point.mean for point in curve])
        spread = np.array([0.0 if math.isnan(point.std) else point.std for point in curve])
        axes.plot(steps, means, marker="o", markersize=3, label=name, color=colours(number % 20))
        axes.fill_between(steps, means - spread, means + spread, alpha=0.08, color=colours(number % 20))
    axes.set_xlabel("tasks merged")
    axes.set_ylabel("percent of the experts, tasks seen so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if results.note:
        axes.set_title(f"Data: {results.note}", fontsize=9)
    return figure


def matrix_figure(results: Results) -> Figure:
    """Return one heat map per method: position of the task across, steps down, mean over orders, percent of expert."""
    names = results.methods
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(3.1 * across + 0.8, 2.8 * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    for place in grid.flat[len(names) :]:
        place.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        rows = results.mean_matrix(name)
        values = np.full((len(rows), len(rows)), np.nan)
        for t, row in enumerate(rows):
            values[t, : t + 1] = row
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=100)
        if len(rows) <= 8:
            for (t, i), value in np.ndenumerate(values):
                if math.isfinite(value):
                    colour = "white" if value < 60 else "black"
                    axes.text(i, t, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_title(name, fontsize=9)
        ticks = range(len(rows)) if len(rows) <= 8 else range(0, len(rows), 4)
        axes.set_xticks(ticks, [str(t + 1) for t in ticks], fontsize=6)
        axes.set_yticks(ticks, [str(t + 1) for t in ticks], fontsize=6)
    grid[-1][0].set_xlabel("task (position in the order)", fontsize=7)
    grid[0][0].set_ylabel("after step", fontsize=7)
    figure.colorbar(image, ax=grid, label="percent of the expert", pad=0.01, shrink=0.8)
    return figure


def sweeps(results: Results, around: str) -> dict[str, list[tuple[float, str]]]:
    """Return, for every numeric option in which some methods differ from one method and in nothing else, their names.

    Args:
        results: Of all of them.
        around: Name of that one method.

    Returns:
        By option: pairs of its value and the method's name, sorted; the method in the middle is among them.
    """
    first = {run.name: run for run in reversed(results.runs) if run.complete}
    if around not in first:
        return {}
    centre = first[around]
    found: dict[str, list[tuple[float, str]]] = {}
    for name, run in first.items():
        if (run.method, run.variant) != (centre.method, centre.variant):
            continue
        differing = [key for key, value in run.options.items() if centre.options.get(key) != value]
        if len(differing) == 1 and type(value := run.options[differing[0]]) in (int, float):
            found.setdefault(differing[0], [(float(centre.options[differing[0]]), around)]).append((float(value), name))
    return {option: sorted(pairs) for option, pairs in found.items()}


def sweep_figure(results: Results, around: str) -> Figure | None:
    """Return ACC and BWT over every option that is varied around one method, as Figure 4 has it; None where none is."""
    if not (found := sweeps(results, around)):
        return None
    figure = Figure(figsize=(3.2 * len(found), 3.2), layout="constrained")
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (option, pairs) in zip(grid, found.items(), strict=True):
        values = [value for value, _ in pairs]
        for label, of in (("ACC", results.acc), ("BWT", results.bwt)):
            points = [of(name, True) for _, name in pairs]
            spread = [0.0 if math.isnan(point.std) else point.std for point in points]
            axes.errorbar(values, [point.mean for point in points], yerr=spread, marker="o", markersize=3, label=label)
        axes.set_xscale("symlog", linthresh=min(v for v in values if v) if any(values) else 1.0)
        axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel(option)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("normalized, percent (points for BWT)")
    grid[0].legend(fontsize=7)
    return figure
