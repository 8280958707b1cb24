"""ACC, BWT and their spread against numbers by hand; the tables and files made of them."""

import csv
import io
import math

import pytest

from nscmerge.errors import ConfigError
from tasks.continual.record import FORMAT, Row, Run, read_run, write_json, write_run
from tasks.continual.report import as_markdown, steps_csv, summary_csv, write_report
from tasks.continual.results import Column, Results, Spread

COLUMNS = {"a": Column("accuracy", True), "b": Column("rmse", False)}
EXPERT, BASE = {"a": 0.8, "b": 2.0}, {"a": 0.2, "b": 8.0}


def a_run(order=("a", "b"), first=0.8, last=(0.4, 4.0), losses=None, name="ours"):
    scores = dict(zip(order, last, strict=True))
    rows = [Row(order[0], {order[0]: first}, 0.5, 10), Row(order[1], scores, 1.5, 20, losses or {})]
    return Run(name, "nufilt", "default", {"seed": 1}, list(order), rows, ["a sentence."])


def results(runs, **options):
    return Results(COLUMNS, BASE, EXPERT, runs, **options)


def test_numbers_by_hand():
    found = results([a_run(), a_run(("b", "a"), 2.0, (2.5, 0.6))])
    # Normalized: [[100], [50, 50]] and [[100], [80, 75]].
    assert found.matrix(found.runs[0], True) == [[100.0], [50.0, 50.0]]
    assert found.matrix(found.runs[1], False) == [[200.0], [250.0, 60.0]]
    acc, bwt = found.acc("ours", True), found.bwt("ours", True)
    assert (acc.mean, acc.std) == (pytest.approx(63.75), pytest.approx(27.5 / 2**0.5))
    assert (bwt.mean, bwt.std) == (pytest.approx(-35.0), pytest.approx(30 / 2**0.5))
    assert found.worst("ours").mean == pytest.approx(62.5)
    assert found.learned("ours").mean == pytest.approx((75 + 87.5) / 2)
    assert found.mean_matrix("ours") == [[100.0], [65.0, 62.5]]
    assert [point.mean for point in found.curve("ours")] == [100.0, 63.75]
    assert found.reference_mean(BASE, True) == pytest.approx(25.0)
    assert found.seconds("ours") == 1.5
    assert math.isnan(found.loss("ours", "stability"))


def test_losses_are_means_over_steps_from_the_second_on():
    pairs = [{"stability": 1.0, "plasticity": 3.0}, {"stability": 3.0, "plasticity": 5.0}]
    found = results([a_run(losses=pairs[0]), a_run(losses=pairs[1])])
    assert found.loss("ours", "stability") == 2.0
    assert found.harmonic("ours") == pytest.approx(2 * 2 * 4 / 6)
    assert math.isnan(found.harmonic("ours", "data_"))
    assert "| ours | 2 | 4 | 2.67 |" in as_markdown(found)


def test_one_order_has_no_spread_and_an_unfinished_run_does_not_count():
    half = Run("half", "opcm", "default", {}, ["a", "b"], a_run().rows[:1])
    found = results([a_run(), half])
    assert found.methods == ["ours"]
    assert str(found.acc("ours", True)) == "50.0"
    assert str(Spread.of([])) == ""
    assert math.isnan(Spread.of([1.0, math.nan]).std)
    assert "half" not in as_markdown(found) + steps_csv(found) + summary_csv(found)


def test_tables_say_what_they_show(tmp_path):
    found = results([a_run(), a_run(("b", "a"), 2.0, (2.5, 0.6))], percent=None, note="rendered scenes (project)")
    text = write_report(found, tmp_path)
    assert "Data: rendered scenes (project)." in text
    assert "| ours | 63.7 ± 19.4 | -35.0 ± 21.2 |" in text or "| ours | 63.8 ± 19.4 | -35.0 ± 21.2 |" in text
    assert "| method | ACC norm." in text  # metrics of different units have no mean of their own
    assert "- ours: a sentence." in text
    assert {f.name for f in tmp_path.iterdir()} == {
        "steps.csv",
        "summary.csv",
        "continual.md",
        "matrix.png",
        "curve.png",
    }
    lines = list(csv.DictReader(io.StringIO(steps_csv(found))))
    assert len(lines) == 6
    assert {k: lines[2][k] for k in ("order", "step", "position", "task", "normalized")} == {
        "order": "1",
        "step": "2",
        "position": "2",
        "task": "b",
        "normalized": "50.0",
    }
    assert float(next(csv.DictReader(io.StringIO(summary_csv(found))))["acc_normalized_mean"]) == pytest.approx(63.75)


def test_a_run_survives_its_file(tmp_path):
    run = a_run(last=(math.nan, 4.0))
    write_run(run, tmp_path / "runs" / "one.json")
    again = read_run(tmp_path / "runs" / "one.json")
    assert math.isnan(again.rows[1].scores["a"])
    assert again.rows[1].scores["b"] == 4.0
    assert (again.order, again.options, again.notes, again.complete) == (run.order, run.options, run.notes, True)
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["one.json"]


def test_damaged_and_newer_files_are_named(tmp_path):
    file = tmp_path / "one.json"
    file.write_text('{"format": 1, "name"')
    with pytest.raises(ConfigError, match=r"one.json is damaged .*remove it"):
        read_run(file)
    write_json({"format": FORMAT + 1}, file)
    with pytest.raises(ConfigError, match=f"has format {FORMAT + 1}; this version reads up to {FORMAT}"):
        read_run(file)
