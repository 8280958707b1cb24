"""Table 11 of the NSC paper: which projections and how many last blocks the null-space ratio is read at.

Sixteen NSC merges (QKVO, KVO, VO, O; all blocks, half, a quarter, one), each learned and all tested together; writes
``OUTPUT/sweep.md`` with the plain and the clipped mean. What is finished in ``OUTPUT`` is not done again.

    python benchmarks/dense_sweep.py --suite synth20 --output runs/synth20_sweep
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from dense_runs import Runs, named
from jsonargparse import auto_cli

PROJECTIONS = {
    "QKVO": ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj"],
    "KVO": ["attn.qkv.k", "attn.qkv.v", "attn.proj"],
    "VO": ["attn.qkv.v", "attn.proj"],
    "O": ["attn.proj"],
}
#: Blocks of the base model.
DEPTH = {"synth20": 8, "dense20": 12}


def main(
    output: Path,
    suite: Literal["synth20", "dense20"] = "synth20",
    fit_words: list[str] = [],  # noqa: B006 (read off by the command line, never changed)
    test_words: list[str] = [],  # noqa: B006
) -> None:
    """Run what is missing, print and write the table.

    Args:
        output: Folder of everything.
        suite: ``synth20``, the stand-in, or ``dense20``, the real data sets.
        fit_words: Further words for ``nscmerge fit``.
        test_words: Further words for ``nscmerge test``.
    """
    runs = Runs(output)
    blocks = [DEPTH[suite] // share for share in (1, 2, 4)] + [1]
    merges = {}
    for name, projections in PROJECTIONS.items():
        for count in blocks:
            words = [
                f"--model.init_args.objective.init_args.projections={json.dumps(projections)}",
                f"--model.init_args.objective.init_args.blocks={count}",
            ]
            merge = f"{name}_{count}"
            merges[merge] = runs.once("fit", [f"{suite}_nsc"], f"merges/{merge}", *words, *fit_words)
    scores = runs.once("test", [f"{suite}_benchmark"], "scores", *named(merges), *test_words)
    table = markdown(json.loads((scores / "scores.json").read_text(encoding="utf-8")), blocks)
    (output / "sweep.md").write_text(table, encoding="utf-8")
    print(table)


def markdown(content: dict, blocks: list[int]) -> str:
    """Return projections down and numbers of last blocks across: plain mean / clipped mean, percent of the experts."""
    lines = [f"Data: {content['data']}.", ""] if "data" in content else []
    lines += ["| avg / avg_clipped | " + " | ".join(f"last {n}" for n in blocks) + " |"]
    lines += ["|---|" + "---:|" * len(blocks)]
    for name in PROJECTIONS:
        cells = [content["candidates"][f"{name}_{count}"] for count in blocks]
        lines.append(f"| {name} | " + " | ".join(f"{c['avg']:.1f} / {c['avg_clipped']:.1f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
