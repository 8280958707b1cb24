"""The benchmark of the real shapes, at real layer counts and small widths: every way of running a step, on the CPU."""

import json

import pytest

from benchmarks.large_base import main
from benchmarks.large_shapes import SHAPES, TINY


@pytest.mark.parametrize("name", ["llama3_8b", pytest.param("llava15_7b", marks=pytest.mark.slow)])
def test_all_ways_learn_the_same_at_the_real_layer_count(name, tmp_path):
    out = tmp_path / "figures.json"
    figures = main(
        ["--tiny", "--device", "cpu", "--steps", "1", "--warm-up", "1", "--shapes", name, "--out", str(out)]
    )[name]
    assert json.loads(out.read_text())[name] == json.loads(json.dumps(figures))
    assert figures["shape"]["layers"] == SHAPES[name].layers == 32
    assert TINY[name].vision is None or TINY[name].vision[2] == SHAPES[name].vision[2] == 24
    ways = figures["ways"]
    first, *others = (way for title, way in ways.items() if title.startswith(("fused", "one task")))
    assert len(others) == 3
    for way in others:
        # Same numbers however graphs are built, and whatever is recomputed.
        assert way["first_loss"] == pytest.approx(first["first_loss"], abs=1e-6)
        assert way["last_loss"] == pytest.approx(first["last_loss"], abs=1e-6)
    assert first["last_loss"] < first["first_loss"]
    # All but the last block's own projections, which no target lies behind; LLaVA's projector has two layers more.
    more = 2 if TINY[name].vision else 0
    assert {way["layers_reached"] for title, way in ways.items() if "bare" not in title} == {62 + more}
    assert first["coefficients"] == (64 + more) * 6
