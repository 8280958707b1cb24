"""The benchmark of continual merging: both ways of a step give the same, on a model small enough for a test."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc, which only Linux has"
)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it is run as a script
    threads = torch.get_num_threads()
    yield importlib.import_module("continual")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["nufilt", "opcm"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_both_ways_agree(benchmark, method, kind):
    sizes = benchmark.Sizes(dim=24, blocks=1, rank=3, kind=kind, quick=False)
    got = benchmark.compare(sizes, method, 3, 1, 1, True)
    # Factors are exact but for NUFILT's solve, which is fp32 for fp32 experts.
    assert got.exact < (1e-3 if kind == "full" else 1e-5 if method == "nufilt" else 1e-12)
    assert got.difference < 1e-2
    assert got.losses[0] == pytest.approx(got.losses[1], rel=1e-4)
    assert (got.losses[0] > 0) == (method == "nufilt")
    assert min(got.ours.wall, got.dense.wall, got.ours.cpu, got.dense.cpu) > 0
    if kind == "lora":
        # Rank 9 at most of 24; nufilt's factors are fp64.
        assert got.sizes[0] < 2 * got.sizes[1]


def test_shapes_are_those_of_a_vit(benchmark):
    sizes = benchmark.Sizes(dim=8, blocks=12, rank=2, kind="lora", quick=False)
    assert len(sizes.layers) == 72
    assert sizes.layers["blocks.3.mlp.fc1"] == (32, 8)
    assert sizes.layers["blocks.11.mlp.fc2"] == (8, 32)
    own, other = sizes.expert(1).layers["blocks.0.attn.q"], sizes.expert(2).layers["blocks.0.attn.q"]
    assert torch.equal(own.A[0], other.A[0])
    assert not torch.equal(own.A[1], other.A[1])
    assert benchmark.Sizes(768, 12, 16, "lora", True).names() == ["blocks.0.attn.q"]


def test_the_table_has_a_row_for_every_measurement(benchmark, capsys):
    benchmark.main(dims=[8], methods=["opcm"], steps=[2], blocks=1, rank=2, markdown=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| opcm | 8 | 2 |")
