"""Figures from merge folders and runs: what is read, and what is said where there is nothing."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from nscmerge.cli import main
from nscmerge.commands.report import report
from nscmerge.errors import ConfigError
from nscmerge.plots import fine_tuning_curves, fine_tuning_figure


def write_run(folder, tag, values):
    writer = SummaryWriter(str(folder))
    for step, value in values.items():
        writer.add_scalar(tag, value, step)
    writer.close()


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs" / "depth" / "version_0", "omega/mean", {0: 0.9, 10: 0.5})
    write_run(tmp_path / "runs" / "edge" / "version_0", "omega/mean", {0: 0.8, 10: 0.75, 20: 0.7})
    write_run(tmp_path / "runs" / "probe" / "version_0", "train/loss", {0: 1.0})  # a head alone has no ratio
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    return tmp_path / "runs"


def test_fine_tuning_curves_are_read_by_expert(runs, tmp_path):
    curves = fine_tuning_curves(runs)
    assert {name: [step for step, _ in points] for name, points in curves.items()} == {
        "depth": [0, 10],
        "edge": [0, 10, 20],
    }
    assert [value for _, value in curves["edge"]] == pytest.approx([0.8, 0.75, 0.7])
    lines = fine_tuning_figure(curves).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["depth", "edge"]
    (file,) = report(tmp_path / "figures", experts=runs)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.name == "fine_tuning.png"


def test_the_command_says_where_the_figure_is(runs, tmp_path, capsys):
    main(["report", "--experts", str(runs), "--output", str(tmp_path / "out")])
    assert f"figure written to {tmp_path / 'out' / 'fine_tuning.png'}" in capsys.readouterr().out


def test_nothing_to_show_is_said(runs, tmp_path, capsys):
    with pytest.raises(ConfigError, match="nothing to report: give --merge"):
        report(tmp_path / "figures")
    for folder in (tmp_path / "missing", runs / "probe"):
        with pytest.raises(ConfigError, match=r"holds no fine-tuning run with 'omega/mean'"):
            report(tmp_path / "figures", experts=folder)
    assert not (tmp_path / "figures").exists()
    with pytest.raises(SystemExit):
        main(["report", "--merge", str(tmp_path), "--output", str(tmp_path / "figures")])
    assert "receipt.json is missing" in capsys.readouterr().err
