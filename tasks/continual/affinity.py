"""``python -m tasks.continual.affinity --config FILE``: do task vectors read what their own task's data consist of?"""

from __future__ import annotations

import csv
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from lightning import LightningDataModule
from matplotlib.figure import Figure

from nscmerge.continual.affinity import DATA_RANK, TASK_RANK, data_subspace, subspace_affinity
from nscmerge.continual.surrogates import top_vectors
from tasks.continual.cli import one_line_errors, parse
from tasks.continual.module import ContinualBenchmark
from tasks.continual.moments import input_moments

#: Group of all layers.
ALL = "all"
#: Inputs per task where the configuration names no number.
INPUTS = 100


@dataclass(frozen=True)
class Affinities:
    """Affinity of every task's data and every task's vector, layer by layer.

    Args:
        tasks: Names, in order.
        widths: Inputs of every layer.
        values: By layer (D, T): data of the tasks down, vectors across.
        groups: Layers by group; :data:`ALL` is one of them.
    """

    tasks: Sequence[str]
    widths: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    groups: Mapping[str, Sequence[str]]

    def mean(self, group: str) -> np.ndarray:
        """Return the mean over a group's layers, (D, T)."""
        found: np.ndarray = np.mean([self.values[layer] for layer in self.groups[group]], axis=0)
        return found

    def pairs(self, group: str, matched: bool) -> np.ndarray:
        """Return the mean over pairs of data and vector, one number per layer: of one task, or of two."""
        own = np.eye(len(self.tasks), dtype=bool)
        return np.array([self.values[layer][own if matched else ~own].mean() for layer in self.groups[group]])

    def expected(self, group: str) -> float:
        """Return the level of unrelated subspaces: r_v / d_in, mean over layers."""
        return fmean(TASK_RANK / self.widths[layer] for layer in self.groups[group])


def measure(module: ContinualBenchmark, data: LightningDataModule) -> Affinities:
    """Return the affinities of all experts and the inputs of all tasks.

    Inputs are those that a layer gets in the data's own expert; ranks are 8 and 8.

    Args:
        module: Model, experts, groups of layers.
        data: Inputs.

    Source: NUFILT, Eq. 5; ranks, number of inputs and activations are not published.
    """
    moments = input_moments(module, data, module.activations or INPUTS)
    tasks = module.task_names
    layers = [name for name in moments[tasks[0]] if all(name in moments[task] for task in tasks)]
    values = {name: np.zeros((len(tasks), len(tasks))) for name in layers}
    spaces = {t: {n: data_subspace(moments[t][n], min(DATA_RANK, len(moments[t][n]))) for n in layers} for t in tasks}
    for j, owner in enumerate(tasks):
        expert = module.expert(owner)
        for name in layers:
            delta = expert.layers[name] if name in expert.layers else expert.dense[f"{name}.weight"]
            vectors = top_vectors(delta, TASK_RANK)
            values[name][:, j] = [subspace_affinity(vectors, spaces[task][name]) for task in tasks]
    groups = {ALL: layers}
    for group, patterns in module.layer_groups.items():
        if found := [n for n in layers if any(fnmatch.fnmatchcase(n, p) for p in patterns)]:
            groups[group] = found
    return Affinities(tasks, {n: len(moments[tasks[0]][n]) for n in layers}, values, groups)


def heat_figure(found: Affinities) -> Figure:
    """Return one heat map per group of layers: data down, task vectors across, as Figures 2 and 6 to 8 have it."""
    names = list(found.groups)
    size = 1.4 + 0.45 * len(found.tasks)
    figure = Figure(figsize=(size * len(names) + 1, size + 0.6), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    top = max(float(found.mean(name).max()) for name in names)
    for axes, name in zip(grid, names, strict=True):
        image = axes.imshow(found.mean(name), cmap="viridis", vmin=0, vmax=top)
        axes.set_title(f"{name} ({len(found.groups[name])} layers)", fontsize=9)
        axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(found.tasks)), found.tasks if axes is grid[0] else [], fontsize=7)
    grid[0].set_ylabel("data of")
    figure.supxlabel("task vector of", fontsize=9)
    figure.colorbar(image, ax=list(grid), label="affinity", shrink=0.8)
    return figure


def ecdf_figure(found: Affinities) -> Figure:
    """Return the share of layers up to an affinity, for data and vector of one task and of two, by group."""
    names = list(found.groups)
    figure = Figure(figsize=(3.2 * len(names) + 0.4, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for matched, label in ((True, "same task"), (False, "two tasks")):
            values = np.sort(found.pairs(name, matched))
            axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=label)
        axes.axvline(found.expected(name), color="grey", linestyle=":", label="unrelated")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("affinity")
    figure.axes[0].set_ylabel("share of layers")
    figure.axes[0].legend(fontsize=7)
    return figure


def as_markdown(found: Affinities) -> str:
    """Return mean and 90th percentile over layers, of data and vector of one task and of two, by group."""
    lines = [
        "| layers | same task: mean | 90th percentile | two tasks: mean | 90th percentile | unrelated |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, layers in found.groups.items():
        own, other = found.pairs(name, True), found.pairs(name, False)
        cells = [own.mean(), np.percentile(own, 90), other.mean(), np.percentile(other, 90), found.expected(name)]
        lines.append(f"| {name} ({len(layers)}) | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(lines) + "\n"


def write(found: Affinities, folder: Path) -> None:
    """Write ``affinity.csv``, ``affinity.md``, ``affinity_heat.png`` and ``affinity_ecdf.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "affinity.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "groups", "data", "task_vector", "affinity"])
        for layer, values in found.values.items():
            groups = " ".join(group for group, layers in found.groups.items() if layer in layers)
            for (i, j), value in np.ndenumerate(values):
                writer.writerow([layer, groups, found.tasks[i], found.tasks[j], repr(float(value))])
    (folder / "affinity.md").write_text(as_markdown(found), encoding="utf-8")
    heat_figure(found).savefig(folder / "affinity_heat.png", dpi=150)
    ecdf_figure(found).savefig(folder / "affinity_ecdf.png", dpi=150)


def main(args: Sequence[str] | None = None) -> None:
    """Measure, write and print; errors of ours as :func:`tasks.continual.cli.one_line_errors` ends with them."""
    with one_line_errors():
        cli = parse(args)
        found = measure(cli.model, cli.datamodule)
        write(found, cli.model.tables)
        print(as_markdown(found))


if __name__ == "__main__":
    main()
