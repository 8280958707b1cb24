"""The study's table: means and spreads by hand, torn lines, settings with fewer seeds."""

import json
import math

import pytest

from benchmarks.learned_table import as_csv, as_markdown, read_lines, rows


def line(objective, seed, **scores):
    scores = {step.removeprefix("at"): {"a": a, "b": b} for step, (a, b) in scores.items()}
    return {"objective": objective, "start": 0.4, "lr": 1e-3, "seed": seed, "scores": scores}


LINES = [
    line("nsc", 0, at50=(90, 100), at100=(80, 100)),
    line("nsc", 1, at50=(98, 96), at100=(80, 100)),
    line("anchored", 0, at50=(99.0, 101.0)),
]


def test_means_and_spreads_over_seeds():
    anchored, early, late = rows(LINES)
    assert (early.setting.steps, early.seeds, early.mean, early.worst) == (50, 2, 96, 93)
    assert early.mean_spread == pytest.approx(math.sqrt(2))  # of 95 and 97, divided by n - 1
    assert early.worst_spread == pytest.approx(3 * math.sqrt(2))  # of 90 and 96
    assert (late.mean, late.mean_spread, late.worst) == (90, 0, 80)
    assert (anchored.seeds, anchored.mean, anchored.worst) == (1, 100, 99)
    assert math.isnan(anchored.mean_spread)


def test_a_fit_that_stands_there_twice_counts_once():
    assert as_csv(rows([*LINES, LINES[0]])) == as_csv(rows(LINES))


def test_a_torn_line_is_no_fit(tmp_path):
    file = tmp_path / "results.jsonl"
    assert read_lines(file) == []
    file.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:-9] + "\n\n" + json.dumps(LINES[2]) + "\n")
    assert read_lines(file) == [LINES[0], LINES[2]]


def test_markdown_and_csv():
    markdown = as_markdown(rows(LINES)).splitlines()
    assert markdown[0].startswith(
        "| objective | start | lr | seeds | mean, 50 steps | worst, 50 steps | mean, 100 steps"
    )
    assert markdown[2] == "| anchored | 0.4 | 0.001 | 1 | 100.0 | 99.0 |  |  |"
    assert markdown[3] == "| nsc | 0.4 | 0.001 | 2 | 96.0 ± 1.4 | 93.0 ± 4.2 | 90.0 ± 0.0 | 80.0 ± 0.0 |"
    header, first, *_ = as_csv(rows(LINES)).splitlines()
    assert header == "objective,start,lr,steps,seeds,mean,mean_spread,worst,worst_spread"
    assert first == "anchored,0.4,0.001,50,1,100.0,nan,99.0,nan"
