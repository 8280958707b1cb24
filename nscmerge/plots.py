"""Figures of what a merge learned, read from merge folders and TensorBoard runs. Matplotlib without a display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from nscmerge.errors import ConfigError

#: Scalar tags of a run that make one curve per task.
CURVES = {
    "omega": "null-space ratio of the training batches",
    "val/omega": "null-space ratio of the validation inputs",
    "entropy": "entropy of the heads' outputs on the training batches, nats",
    "val/entropy": "entropy of the heads' outputs on the validation inputs, nats",
    "lam_mean": "mean merge coefficient",
}


#: Tag of the ratio of all adapted layers while an expert is fine-tuned.
FINE_TUNING = "omega/mean"


def heat_map(matrix: Tensor, layers: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Return a figure of merge coefficients, layers down, tasks across; ``matrix`` is (L, T), NaN where none."""
    figure = Figure(figsize=(3.5 + 0.6 * len(tasks), 1.5 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=axes, label="merge coefficient")
    return figure


def coefficients_figure(merge: Path) -> Figure:
    """Return the heat map of a merge folder's learned coefficients.

    Raises:
        ConfigError: There is no receipt, or it holds no coefficients (closed-form merges have none).
    """
    receipt = merge / "receipt.json"
    if not receipt.is_file():
        raise ConfigError(f"{receipt} is missing; give the merge folder that a fit or a merge wrote.")
    coefficients = json.loads(receipt.read_text(encoding="utf-8")).get("coefficients")
    if not coefficients:
        raise ConfigError(f"{receipt} holds no learned coefficients; give a merge that 'nscmerge fit' learned.")
    tasks = list(coefficients)
    layers = list(coefficients[tasks[0]])
    rows = [[coefficients[task][layer] for task in tasks] for layer in layers]
    return heat_map(torch.tensor([[float("nan") if v is None else v for v in row] for row in rows]), layers, tasks)


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return ``{tag: [(step, value)]}`` of a TensorBoard run.

    Raises:
        ConfigError: The folder holds no TensorBoard events.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(run.glob("events.out.tfevents.*")):
        raise ConfigError(f"{run} holds no TensorBoard events; give a run's own folder, such as runs/NAME/version_0.")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return ``{tag: {task: [(step, value)]}}`` of the tags in :data:`CURVES` that a TensorBoard run has.

    Raises:
        ConfigError: The folder holds no TensorBoard events.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in read_scalars(run).items():
        tag, _, task = name.rpartition("/")
        if tag in CURVES:
            curves.setdefault(tag, {})[task] = points
    return curves


def curves_figure(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return one line per task over training steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for task, points in sorted(curves.items()):
        axes.plot([s for s, _ in points], [v for _, v in points], label=task)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.legend(fontsize=8)
    return figure


def fine_tuning_curves(runs: Path) -> dict[str, list[tuple[int, float]]]:
    """Return ``{expert: [(step, mean null-space ratio of its layers)]}`` of fine-tuning runs.

    Args:
        runs: Folder with one folder per expert, each with its TensorBoard run or runs (the latest counts).

    Raises:
        ConfigError: No expert's run in there holds the ratio.
    """
    found = {}
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []:
        events = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
        curves = [points for file in events if (points := read_scalars(file.parent).get(FINE_TUNING))]
        if curves:
            found[folder.name] = curves[-1]
    if not found:
        raise ConfigError(
            f"{runs} holds no fine-tuning run with '{FINE_TUNING}'; give the folder that has one folder per expert, "
            "such as runs/experts/synth20."
        )
    return found


def fine_tuning_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return the null-space ratio over the steps of fine-tuning, one line per expert."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for number, (name, points) in enumerate(sorted(curves.items())):
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot([s for s, _ in points], [v for _, v in points], style, label=name, linewidth=1, marker=".")
    axes.set_xlabel("step of fine-tuning")
    axes.set_ylabel("null-space ratio of the expert's own layers")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
