"""Scores as a picture, laid out like Table 1 of the NSC paper. Matplotlib without a display."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tasks.scores import EXPERT, Scores


def table_figure(scores: Scores) -> Figure:
    """Return a heat map: candidates down, tasks across, side by side within their group, and what sums them up.

    Colour is the normalized score from 0 to 100 percent, more than 100 has a colour of its own; the expert's row holds
    absolute values and has none.
    """
    grouped = [task for tasks in scores.groups.values() for task in tasks]
    tasks = [*grouped, *(task for task in scores.tasks if task not in grouped)]
    rows = [scores.expert, *(row for row in scores.rows if row.name != EXPERT)]
    sums = [*scores.groups, "avg", "avg_clipped", "worst"]
    percent = np.full((len(rows), len(tasks) + len(sums)), np.nan)
    texts = [[f"{scores.value(scores.expert, task):.3g}" for task in tasks] + [""] * len(sums)]
    for i, row in enumerate(rows[1:], start=1):
        means = [*scores.group_means(row).values(), row.mean, row.clipped, row.worst[1]]
        percent[i] = [*(row.normalized[task] for task in tasks), *means]
        texts.append([f"{value:.1f}" for value in percent[i]])

    figure = Figure(figsize=(2.5 + 0.55 * percent.shape[1], 1.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"].with_extremes(over="salmon", bad="white")
    image = axes.imshow(percent, aspect="auto", cmap=colours, vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(percent):
        dark = math.isfinite(value) and value < 60
        axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=7, color="white" if dark else "black")
    arrows = ["↑" if scores.tasks[task].higher_is_better else "↓" for task in tasks]
    labels = [f"{task}\n{scores.tasks[task].metric} {arrow}" for task, arrow in zip(tasks, arrows, strict=True)]
    axes.set_xticks(
        range(percent.shape[1]), [*labels, *sums], rotation=60, ha="left", rotation_mode="anchor", fontsize=7
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [f"{EXPERT} (absolute)", *(row.name for row in rows[1:])], fontsize=8)
    edges = np.cumsum([len(names) for names in scores.groups.values()])
    for edge in dict.fromkeys([*edges.tolist(), len(tasks)]):
        axes.axvline(edge - 0.5, color="white", linewidth=3)
    figure.colorbar(image, ax=axes, label="percent of the expert", extend="max", pad=0.01)
    if scores.note:
        figure.suptitle(f"Data: {scores.note}", fontsize=9)
    return figure
