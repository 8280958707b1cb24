"""Table 1 of the NSC paper, as a project's own table: all methods on twenty dense tasks, by one command.

Learns NSC merges and tests them beside base, experts and every closed-form method at the scales of
``configs/experiments/SUITE_benchmark_methods.yaml``; writes CSV, Markdown, JSON and a heat map to ``OUTPUT/scores``.
What is finished in ``OUTPUT`` is not done again. With ``--search`` the scales are searched first, and printed.

    python benchmarks/dense_table.py --suite synth20 --output runs/synth20
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dense_runs import Runs, named
from jsonargparse import auto_cli

#: Learned merges: configurations, the later laid over the earlier, and overrides.
LEARNED: dict[str, tuple[list[str], list[str]]] = {
    "nsc": (["nsc"], []),
    "nsc_adam": (["nsc", "nsc_adam"], []),
    "nsc_from_average": (["nsc"], ["--model.init_args.init=weight_average"]),
    "anchored_ours": (["anchored"], []),
}


def main(
    output: Path,
    suite: Literal["synth20", "dense20"] = "synth20",
    learned: list[str] = ["nsc", "nsc_from_average", "anchored_ours"],  # noqa: B006 (read by the command line)
    fit_words: list[str] = [],  # noqa: B006
    test_words: list[str] = [],  # noqa: B006
    search: bool = False,
) -> None:
    """Run what is missing.

    Args:
        output: Folder of everything.
        suite: ``synth20``, the stand-in, or ``dense20``, the real data sets.
        learned: Which learned merges; ``nsc_adam``, the supplement's optimizer, hardly moves in 100 steps.
        fit_words: Further words for ``nscmerge fit``.
        test_words: Further words for ``nscmerge test``.
        search: Search the scales of the closed-form methods; the configuration of the test takes them from there.
    """
    runs = Runs(output)
    if search:
        runs.once("search", [f"{suite}_search"], "search")
    merges = {}
    for name in learned:
        configs, words = LEARNED[name]
        merges[name] = runs.once("fit", [f"{suite}_{c}" for c in configs], f"merges/{name}", *words, *fit_words)
    configs = [f"{suite}_benchmark", f"{suite}_benchmark_methods"]
    scores = runs.once("test", configs, "scores", *named(merges), *test_words)
    print((scores / "scores.md").read_text(encoding="utf-8"))
    for target, seconds in runs.seconds().items():
        print(f"{target}: {seconds:.0f} s")
    print(f"tables and heat map: {scores}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
