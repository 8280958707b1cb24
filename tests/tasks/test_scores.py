import csv
import io
import json
import math

import pytest

from nscmerge.errors import OutputExistsError
from tasks.scores import Scores, TaskInfo

TASKS = {"bbc": TaskInfo("accuracy", True, 100), "depth": TaskInfo("rmse", False, 20)}
VALUES = {
    "base": {"bbc": {"accuracy": 0.2}, "depth": {"rmse": 2.0}},
    "expert": {"bbc": {"accuracy": 0.8}, "depth": {"rmse": 0.5}},
    "ours": {"bbc": {"accuracy": 0.6}, "depth": {"rmse": 0.4}},
}


@pytest.fixture
def scores():
    return Scores.of(TASKS, VALUES, {"base_model": "someone/tiny"})


def test_rows_by_hand(scores):
    base, expert, ours = scores.rows
    assert base.normalized == pytest.approx({"bbc": 25.0, "depth": 25.0})
    assert expert.normalized == {"bbc": 100.0, "depth": 100.0}
    assert ours.normalized == pytest.approx({"bbc": 75.0, "depth": 125.0})
    assert (ours.mean, ours.worst, ours.spread) == (pytest.approx(100.0), ("bbc", pytest.approx(75.0)), 25.0)


def test_json_and_csv_hold_the_same_numbers(scores):
    content = json.loads(scores.as_json())
    assert content["tasks"]["depth"] == {"metric": "rmse", "higher_is_better": False, "samples": 20}
    assert content["base_model"] == "someone/tiny"
    lines = list(csv.DictReader(io.StringIO(scores.as_csv())))
    assert len(lines) == 6
    for line in lines:
        cell = content["candidates"][line["candidate"]]["tasks"][line["task"]]
        for key in ("value", "expert", "normalized"):
            assert float(line[key]) == cell[key]
    assert content["candidates"]["ours"]["worst"] == {"task": "bbc", "normalized": pytest.approx(75.0)}


def test_tables_put_the_expert_first_in_absolute_values(scores):
    assert scores.lines() == [
        ["expert (absolute)", "0.800", "0.500", "", "", ""],
        ["base", "25.0", "25.0", "25.0", "25.0 (bbc)", "0.0"],
        ["ours", "75.0", "125.0", "100.0", "75.0 (bbc)", "25.0"],
    ]
    markdown = scores.as_markdown()
    assert "| normalized % | bbc (accuracy ↑) | depth (rmse ↓) | mean | worst | spread |" in markdown
    assert "| ours | 0.600 | 0.400 |" in markdown


def test_the_console_shows_every_number_however_narrow_it_is(scores, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    scores.print()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith((" ours", "ours"))] == [
        ["ours", "75.0", "125.0", "100.0", "75.0", "25.0"]
    ]
    assert any(line.split() == ["expert", "(absolute)", "0.800", "0.500"] for line in lines)


def test_a_score_that_says_nothing_is_seen_and_is_valid_json():
    values = {name: {"bbc": {"accuracy": 0.0 if name == "expert" else 0.5}} for name in VALUES}
    scores = Scores.of({"bbc": TASKS["bbc"]}, values)
    row = json.loads(scores.as_json())["candidates"]["ours"]
    assert row["tasks"]["bbc"]["normalized"] is row["mean"] is row["spread"] is None
    assert math.isnan(scores.rows[2].mean)
    assert math.isnan(scores.rows[2].spread)


def test_a_folder_is_written_once(scores, tmp_path):
    scores.write(tmp_path / "scores")
    assert {f.name for f in (tmp_path / "scores").iterdir()} == {"scores.json", "scores.csv", "scores.md"}
    with pytest.raises(OutputExistsError):
        scores.write(tmp_path / "scores")
