"""The console script as a user meets it."""

import json

import pytest
import torch

from nscmerge import Adapter, LowRank, __version__, save_adapter
from nscmerge.cli import COMMANDS, main
from nscmerge.update import load_update


@pytest.fixture
def folders(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for k in range(2):
        layers = {
            "blocks.0.q": LowRank(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 2.0)
        }
        paths.append(save_adapter(Adapter(layers, "base", name=f"t{k}"), tmp_path / f"t{k}"))
    return paths


def stopped(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return stop.value.code, capsys.readouterr().err


def test_help_names_every_command(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out.strip() == f"nscmerge {__version__}"


def test_unknown_command(capsys):
    code, err = stopped(capsys, "marge")
    assert code == 2
    assert "no command 'marge'. Known: fit" in err


def test_merge_writes_a_merge_folder(folders, tmp_path, capsys):
    main(["merge", "task_arithmetic", *map(str, folders), "--lam", "0.4", "--output", str(tmp_path / "out")])
    assert "merge written to" in capsys.readouterr().out
    update = load_update(tmp_path / "out")
    experts = [load_update(f).delta("blocks.0.q") for f in folders]
    torch.testing.assert_close(update.delta("blocks.0.q"), 0.4 * sum(experts), rtol=1e-5, atol=1e-6)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["options"] == {"lam": 0.4}
    assert [i["name"] for i in receipt["inputs"]] == ["t0", "t1"]
    assert all(len(i["sha256"]) == 64 for i in receipt["inputs"])


def test_names_can_be_given(folders, tmp_path):
    named = [f"{name}={folder}" for name, folder in zip(("left", "right"), folders, strict=True)]
    main(["merge", "svd", *named, "--rank", "1", "--output", str(tmp_path / "out")])
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert [i["name"] for i in receipt["inputs"]] == ["left", "right"]
    assert receipt["layers"]["blocks.0.q"]["rank"] == 1
    assert 0 < receipt["relative_error"]["blocks.0.q"] < 1


def test_errors_are_one_line_and_write_nothing(folders, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    cases = [
        (["merge", "svd", *folders, "--output", tmp_path / "there"], "is there already"),
        (["merge", "svd", *folders, tmp_path / "gone", "--output", tmp_path / "out"], "gone' is neither a folder"),
        (["merge", "svd", f"a={folders[0]}", folders[1], "--output", tmp_path / "out"], "write NAME=FOLDER for all"),
        (["merge", "svd", *folders, "--rank", "0", "--output", tmp_path / "out"], "rank is 0; expected"),
        (
            ["report", "--merge", folders[0], "--logs", tmp_path, "--output", tmp_path / "out"],
            "receipt.json is missing",
        ),
    ]
    for words, message in cases:
        code, err = stopped(capsys, *words)
        assert code == 1
        assert message in err
        assert err.strip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t0", "t1", "there"]


def test_methods_prints_the_table(capsys):
    main(["methods"])
    out = capsys.readouterr().out
    assert "task_arithmetic" in out
    assert "lam = 1.0" in out
