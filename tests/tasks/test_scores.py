import csv
import io
import json
import math

import pytest

from nscmerge.errors import OutputExistsError
from tasks.score_figure import table_figure
from tasks.score_tables import lines, summary_csv
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
    read = list(csv.DictReader(io.StringIO(scores.as_csv())))
    assert len(read) == 6
    for line in read:
        cell = content["candidates"][line["candidate"]]["tasks"][line["task"]]
        for key in ("value", "expert", "normalized"):
            assert float(line[key]) == cell[key]
    assert content["candidates"]["ours"]["worst"] == {"task": "bbc", "normalized": pytest.approx(75.0)}


def test_tables_put_the_expert_first_in_absolute_values(scores):
    assert lines(scores) == [
        ["expert (absolute)", "0.800", "0.500", "", "", "", ""],
        ["base", "25.0", "25.0", "25.0", "25.0", "25.0 (bbc)", "0.0"],
        ["ours", "75.0", "125.0", "100.0", "87.5", "75.0 (bbc)", "25.0"],
    ]
    markdown = scores.as_markdown()
    assert "| normalized % | bbc (accuracy ↑) | depth (rmse ↓) | avg | avg_clipped | worst | spread |" in markdown
    assert "| ours | 0.600 | 0.400 |" in markdown


def test_the_console_shows_every_number_however_narrow_it_is(scores, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    scores.print()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if line.startswith((" ours", "ours"))] == [
        ["ours", "75.0", "125.0", "100.0", "87.5", "75.0", "25.0"]
    ]
    assert any(line.split() == ["expert", "(absolute)", "0.800", "0.500"] for line in printed)


def test_a_score_that_says_nothing_is_seen_and_is_valid_json():
    values = {name: {"bbc": {"accuracy": 0.0 if name == "expert" else 0.5}} for name in VALUES}
    scores = Scores.of({"bbc": TASKS["bbc"]}, values)
    row = json.loads(scores.as_json())["candidates"]["ours"]
    assert row["tasks"]["bbc"]["normalized"] is row["mean"] is row["avg_clipped"] is row["spread"] is None
    assert math.isnan(scores.rows[2].mean)
    assert math.isnan(scores.rows[2].clipped)
    assert math.isnan(scores.rows[2].spread)


def test_a_merge_that_broke_counts_as_zero_not_as_the_winner():
    values = {"expert": VALUES["expert"], "broken": {"bbc": {"accuracy": math.nan}, "depth": {"rmse": 0.0}}}
    with pytest.warns(UserWarning, match="counts as 0 percent"):
        broken = Scores.of(TASKS, values).rows[1]
    assert broken.normalized == {"bbc": 0.0, "depth": 0.0}
    assert (broken.mean, broken.clipped, broken.worst) == (0.0, 0.0, ("bbc", 0.0))


def test_a_folder_is_written_once(scores, tmp_path):
    scores.write(tmp_path / "scores")
    files = {"scores.json", "scores.csv", "scores.md", "scores.png", "summary.csv"}
    assert {f.name for f in (tmp_path / "scores").iterdir()} == files
    assert (tmp_path / "scores" / "scores.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        scores.write(tmp_path / "scores")


NOTE = "synthetic ray-cast scenes (project)"


@pytest.fixture
def many():
    """Ten tasks of two data sets and one of none, lower better; ours is half as good on one and twice on the next."""
    groups = ["nyud"] * 4 + [None] + ["tax"] * 5
    tasks = {f"t{i}": TaskInfo("L1", False, 3, group) for i, group in enumerate(groups)}
    values = {
        "base": {task: {"L1": 0.04} for task in tasks},
        "expert": {task: {"L1": 0.01} for task in tasks},
        "ours": {task: {"L1": 0.02 if i % 2 else 0.005} for i, task in enumerate(tasks)},
    }
    return Scores.of(tasks, values, {"data": NOTE})


def test_many_tasks_are_summed_up_by_group(many, capsys):
    ours = many.rows[2]
    assert many.groups == {"nyud": ["t0", "t1", "t2", "t3"], "tax": ["t5", "t6", "t7", "t8", "t9"]}
    assert many.group_means(ours) == pytest.approx({"nyud": 125.0, "tax": (3 * 50 + 2 * 200) / 5})
    assert (ours.mean, ours.clipped) == (pytest.approx(125.0), pytest.approx(75.0))
    content = json.loads(many.as_json())
    assert content["data"] == NOTE
    assert content["tasks"]["t0"]["group"] == "nyud"
    assert content["candidates"]["ours"]["groups"] == pytest.approx({"nyud": 125.0, "tax": 110.0})
    assert content["candidates"]["ours"]["avg"] == content["candidates"]["ours"]["mean"] == pytest.approx(125.0)
    (row,) = [row for row in csv.DictReader(io.StringIO(summary_csv(many))) if row["candidate"] == "ours"]
    assert float(row["nyud"]) == pytest.approx(125.0)
    assert float(row["avg_clipped"]) == pytest.approx(75.0)
    assert (row["worst_task"], row["data"]) == ("t1", NOTE)
    assert {row["data"] for row in csv.DictReader(io.StringIO(many.as_csv()))} == {NOTE}
    markdown = many.as_markdown()
    assert f"Data: {NOTE}." in markdown
    assert "| ours | 125.0 | 110.0 | 125.0 | 75.0 | 50.0 (t1) | 75.0 |" in markdown
    assert "| t9 |" in markdown
    many.print()
    printed = capsys.readouterr().out
    assert NOTE in " ".join(printed.split())  # a title may be wrapped
    assert "t9" not in printed  # no console holds twenty columns
    assert "50.0 (t1)" in printed


def test_the_picture_has_a_cell_for_every_number(many):
    figure = table_figure(many)
    axes = figure.axes[0]
    assert len(axes.texts) == 3 * (10 + 2 + 3)
    labels = [label.get_text().split("\n")[0] for label in axes.get_xticklabels()]
    assert labels[-7:] == ["t9", "t4", "nyud", "tax", "avg", "avg_clipped", "worst"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["expert (absolute)", "base", "ours"]
    assert NOTE in figure.get_suptitle()
    assert table_figure(Scores.of(TASKS, VALUES)).get_suptitle() == ""
