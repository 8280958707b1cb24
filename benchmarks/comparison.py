"""Every method on the six text tasks over several seeds: learned merges, and closed-form ones at both searched scales.

A seed decides which unlabelled samples learned merges see, which validation samples the searches see, and what DARE and
LoRA-LEGO draw; experts and test samples stay. Runs the console commands one after the other, each with its own
progress; what is finished in ``OUTPUT`` is not done again. Hours on two cores.

    python benchmarks/comparison.py --output runs/comparison
    python benchmarks/comparison.py --output runs/small --seeds '[0]' --search_words '[--model.init_args.grid.stop=0.3]'
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from jsonargparse import auto_cli
from rich.table import Table

from nscmerge.console import print_table

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments"
#: Learned merges: configuration and overrides.
LEARNED = {
    "nsc": ("text6_nsc", []),
    "nsc_from_average": ("text6_nsc", ["--model.init_args.init", "weight_average"]),
    "anchored": ("text6_anchored", []),
}
DRAWN = ("dare_ties", "knots_dare_ties", "lora_lego")


def main(
    output: Path,
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006 (read off by the command line, never changed)
    search_words: list[str] = [],  # noqa: B006
    fit_words: list[str] = [],  # noqa: B006
) -> None:
    """Run what is missing and print and write the table.

    Args:
        output: Folder of everything; one sub-folder per seed.
        seeds: Seeds.
        search_words: Further words for ``nscmerge search``.
        fit_words: Further words for ``nscmerge fit``.
    """
    for seed in seeds:
        folder = output / str(seed)
        for name, (config, words) in LEARNED.items():
            _once(folder / "learned" / name, "fit", config, "--data.init_args.seed", seed, *words, *fit_words)
        draws = [f"--model.init_args.methods.{m}={json.dumps({'method': m, 'options': {'seed': seed}})}" for m in DRAWN]
        _once(folder / "search", "search", "text6_search", "--data.init_args.val_seed", seed, *draws, *search_words)
        merges = [*(folder / "learned").iterdir(), *(folder / "search" / "merges").iterdir()]
        # Dots of "ties.loss" would be levels of the configuration.
        named = {path.name.replace(".", "_by_"): str(path) for path in sorted(merges)}
        _once(folder / "scores", "test", "text6_benchmark", f"--model.init_args.merges={json.dumps(named)}")
    contents = [json.loads((output / str(s) / "scores" / "scores.json").read_text())["candidates"] for s in seeds]
    rows = sorted(((n, *_spread([c[n] for c in contents])) for n in contents[0]), key=lambda row: -row[1])
    table = Table(title=f"percent of the experts over {len(seeds)} seeds: mean and standard deviation")
    lines = ["| merge | mean | worst task |", "|---|---|---|"]
    for column in ("merge", "mean", "worst task"):
        table.add_column(column)
    for name, mean, mean_spread, worst, worst_spread in rows:
        cells = name, f"{mean:.1f} ± {mean_spread:.1f}", f"{worst:.1f} ± {worst_spread:.1f}"
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    print_table(table)
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _once(target: Path, command: str, config: str, *words: object) -> None:
    """Run one console command unless its output folder is there already; the folder appears only when it is whole."""
    if target.exists():
        return
    print(f"{command}: {target}", flush=True)
    base = [sys.executable, "-m", "nscmerge", command, "--config", str(CONFIGS / f"{config}.yaml")]
    logger = ["--trainer.logger", "false"] if command == "fit" else []
    subprocess.run([*base, *map(str, words), *logger, "--model.init_args.output", str(target)], check=True)


def _spread(candidates: list[dict]) -> tuple[float, float, float, float]:
    """Return mean and standard deviation over seeds of the mean over tasks, and of the worst task."""
    means, worsts = [], []
    for candidate in candidates:
        normalized = [cell["normalized"] for cell in candidate["tasks"].values()]
        means.append(fmean(normalized))
        worsts.append(min(normalized))
    over = [(fmean(values), stdev(values) if len(values) > 1 else 0.0) for values in (means, worsts)]
    return (*over[0], *over[1])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
