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
