"""``nscmerge report``: figures of a learned merge from its folder and its TensorBoard run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from nscmerge.folders import new_folder
from nscmerge.plots import CURVES, coefficients_figure, curves_figure, read_curves


def run(args: Sequence[str]) -> None:
    """Write the figures and say where they are."""
    parser = ArgumentParser(prog="nscmerge report", description="Figures of a learned merge, as PNG.")
    parser.add_function_arguments(report, as_group=False)
    options = parser.parse_args(list(args)[1:])
    for file in report(**options.as_dict()):
        print(f"figure written to {file}")


def report(merge: Path, logs: Path, output: Path) -> list[Path]:
    """Return the figures written: coefficients as a heat map, and a curve per task of everything in CURVES.

    Args:
        merge: Merge folder that ``nscmerge fit`` wrote.
        logs: Its TensorBoard run folder.
        output: Folder to write; must not exist.

    Raises:
        ConfigError: A folder is not what it should be.
        OutputExistsError: ``output`` is there already.
    """
    figures = {"coefficients": coefficients_figure(merge)}
    for tag, curves in read_curves(logs).items():
        figures[tag.replace("/", "_")] = curves_figure(CURVES[tag], curves)
    with new_folder(output) as partial:
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png", dpi=150)
    return [output / f"{name}.png" for name in figures]
