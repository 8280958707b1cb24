"""The drivers of the dense studies: which commands they run, in which order, and that nothing is done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import dense_sweep  # noqa: E402
import dense_table  # noqa: E402

from nscmerge.cli import main  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """Commands that were run; each leaves its output folder, and a test its scores."""
    found = []

    def run(words, check):
        assert check
        assert words[:3] == [sys.executable, "-m", "nscmerge"]
        found.append(words[3:])
        output = Path(next(w for w in words if w.startswith("--model.init_args.output=")).partition("=")[2])
        output.mkdir(parents=True)
        if words[3] == "test":
            names = [w.removeprefix("--model.init_args.merges.").partition("=")[0] for w in words if ".merges." in w]
            candidates = {n: {"avg": 90.0 + i, "avg_clipped": 80.0 + i} for i, n in enumerate(names)}
            (output / "scores.json").write_text(json.dumps({"data": "made up", "candidates": candidates}))
            (output / "scores.md").write_text("# Scores\n")

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_the_table_learns_then_tests_and_keeps_what_is_finished(calls, tmp_path, capsys):
    dense_table.main(tmp_path, learned=["nsc", "nsc_adam"], search=True)
    assert [words[0] for words in calls] == ["search", "fit", "fit", "test"]
    assert all(Path(word).is_file() for words in calls for word in words if word.endswith(".yaml"))
    overlaid = [Path(word).name for word in calls[2] if word.endswith(".yaml")]
    assert overlaid == ["synth20_nsc.yaml", "synth20_nsc_adam.yaml"]
    assert f"--model.init_args.merges.nsc_adam={tmp_path / 'merges' / 'nsc_adam'}" in calls[3]
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {
        "search", "merges/nsc", "merges/nsc_adam", "scores",
    }  # fmt: skip
    dense_table.main(tmp_path, learned=["nsc", "nsc_adam"], search=True)
    assert len(calls) == 4
    assert "is there, kept" in capsys.readouterr().out


def test_the_sweep_is_sixteen_merges_and_one_table(calls, tmp_path):
    dense_sweep.main(tmp_path)
    assert [words[0] for words in calls] == ["fit"] * 16 + ["test"]
    assert '--model.init_args.objective.init_args.projections=["attn.qkv.v", "attn.proj"]' in calls[8]
    assert [w.partition("blocks=")[2] for words in calls[:4] for w in words if "blocks=" in w] == ["8", "4", "2", "1"]
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert table[0] == "Data: made up."
    assert table[2] == "| avg / avg_clipped | last 8 | last 4 | last 2 | last 1 |"
    assert table[7] == "| O | 102.0 / 92.0 | 103.0 / 93.0 | 104.0 / 94.0 | 105.0 / 95.0 |"


@pytest.mark.parametrize("suite", ["synth20", "dense20"])
def test_what_the_drivers_say_is_understood(calls, tmp_path, suite, capsys):
    dense_sweep.main(tmp_path / "sweep", suite=suite)
    dense_table.main(tmp_path / "table", suite=suite)
    for words in (calls[0], calls[16], calls[-2], calls[-1]):
        words = [w for w in words if not w.startswith("--model.init_args.output=")]  # is there by now
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err
