"""``nscmerge report``: figures of a learned merge from its folder and its TensorBoard run, and of fine-tuning runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from nscmerge.errors import ConfigError
from nscmerge.folders import new_folder
from nscmerge.plots import (
    CURVES,
    coefficients_figure,
    curves_figure,
    fine_tuning_curves,
    fine_tuning_figure,
    read_curves,
)


def run(args: Sequence[str]) -> None:
    """Write the figures and say where they are."""
    parser = ArgumentParser(prog="nscmerge report", description="Figures of a learned merge, as PNG.")
    parser.add_function_arguments(report, as_group=False)
    options = parser.parse_args(list(args)[1:])
    for file in report(**options.as_dict()):
        print(f"figure written to {file}")


def report(
    output: Path, merge: Path | None = None, logs: Path | None = None, experts: Path | None = None
) -> list[Path]:
    """Return the figures written: a merge's coefficients, a curve per task of everything in CURVES, and fine-tuning.

    Args:
        output: Folder to write; must not exist.
        merge: Merge folder that ``nscmerge fit`` wrote: its coefficients as a heat map.
        logs: The merge's TensorBoard run folder: its curves.
        experts: Folder with a folder of TensorBoard runs per expert: the null-space ratio while they were fine-tuned.

    Raises:
        ConfigError: A folder is not what it should be, or none is given.
        OutputExistsError: ``output`` is there already.
    """
    figures = {}
    if merge is not None:
        figures["coefficients"] = coefficients_figure(merge)
    for tag, curves in read_curves(logs).items() if logs is not None else ():
        figures[tag.replace("/", "_")] = curves_figure(CURVES[tag], curves)
    if experts is not None:
        figures["fine_tuning"] = fine_tuning_figure(fine_tuning_curves(experts))
    if not figures:
        raise ConfigError("nothing to report: give --merge, --logs with curves of a merge, or --experts.")
    with new_folder(output) as partial:
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png", dpi=150)
    return [output / f"{name}.png" for name in figures]
