"""The console script as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nscmerge import METHODS, Adapter, LowRank, __version__, merge, save_adapter
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
        (["merge", "ties", *folders, "--energy", "1.5", "--output", tmp_path / "out"], "energy is 1.5; expected"),
        (["merge", "svd", folders[0], folders[0], "--output", tmp_path / "out"], "one and the same, listed twice"),
        (["merge", "svd", *folders, "--dtype", "float16", "--output", tmp_path / "out"], "give --fold-into BASE"),
        (
            ["merge", "svd", *folders, "--fold-into", tmp_path / "gone", "--output", tmp_path / "out"],
            "gone' is neither a folder",
        ),
    ]
    for words, message in cases:
        code, err = stopped(capsys, *words)
        assert code == 1
        assert message in err
        assert err.strip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t0", "t1", "there"]


@pytest.fixture
def uneven(tmp_path):
    """Adapters of different ranks and layers, and their base model's checkpoint."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"blocks.0.q": (5, 6), "blocks.0.v": (7, 6), "blocks.1.q": (5, 6)}
    for k, (rank, names) in enumerate([(1, "blocks.0.q"), (3, "blocks.0.q blocks.0.v"), (2, " ".join(shapes))]):
        layers = {
            n: LowRank(
                torch.randn(rank, shapes[n][1], generator=generator),
                torch.randn(shapes[n][0], rank, generator=generator),
                0.5,
            )
            for n in names.split()
        }
        save_adapter(Adapter(layers, "base"), tmp_path / f"u{k}")
    (tmp_path / "base").mkdir()
    weights = {f"{n}.weight": torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    return [str(tmp_path / f"u{k}") for k in range(3)]


def test_adapters_of_different_ranks_and_layers(uneven, tmp_path, capsys):
    main(["merge", "task_arithmetic", *uneven, "--output", str(tmp_path / "exact")])
    main(["merge", "ties", *uneven, "--density", "0.5", "--rank", "2", "--output", str(tmp_path / "cut")])
    assert "rank cut in 3 layers: relative error" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "exact" / "receipt.json").read_text())
    assert {n: line["rank"] for n, line in receipt["layers"].items()} == {
        "blocks.0.q": 6,
        "blocks.0.v": 5,
        "blocks.1.q": 2,
    }
    receipt = json.loads((tmp_path / "cut" / "receipt.json").read_text())
    assert {line["rank"] for line in receipt["layers"].values()} == {2}
    assert receipt["options"] == {"lam": 1.0, "density": 0.5, "agg": "mean", "rank": 2}
    assert not (tmp_path / "cut" / "delta.safetensors").exists()
    experts = [load_update(folder) for folder in uneven]
    merged = load_update(tmp_path / "exact")
    torch.testing.assert_close(merged.delta("blocks.0.v"), sum(e.delta("blocks.0.v") for e in experts[1:]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_variant_has_its_command(method, folders, tmp_path, capsys):
    for variant in METHODS[method].variants:
        out = tmp_path / variant
        main(["merge", method, *map(str, folders), "--variant", variant, "--output", str(out)])
        assert load_update(out).recipe.options == METHODS[method].options(variant)
    with pytest.raises(SystemExit):
        main(["merge", method, "--help"])
    text = capsys.readouterr().out
    assert "--rank" in text
    assert "--energy" in text


def test_a_merge_folded_into_its_base(uneven, tmp_path, capsys):
    fold = ["--fold-into", str(tmp_path / "base"), "--output"]
    main(["merge", "svd", *uneven, *fold, str(tmp_path / "out")])
    assert "rounding to float32 takes" in capsys.readouterr().out
    merged = merge(uneven, "svd")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    for name in merged.layers:
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + merged.delta(name))
    main(["merge", "svd", *uneven, "--lam", "1e-4", "--dtype", "bfloat16", *fold, str(tmp_path / "half")])
    assert "warning: rounding to bfloat16 takes" in capsys.readouterr().err
    code, err = stopped(capsys, "merge", "emr", *uneven, *fold, tmp_path / "emr")
    assert code == 1
    assert "weights per task (u0, u1, u2)" in err
    main(["merge", "emr", *uneven, "--task", "u1", *fold, str(tmp_path / "emr")])
    after = load_file(tmp_path / "emr" / "model.safetensors")["blocks.0.v.weight"]
    torch.testing.assert_close(after, before["blocks.0.v.weight"] + merge(uneven, "emr").delta("blocks.0.v", "u1"))


def test_methods_prints_the_table(capsys):
    main(["methods"])
    out = capsys.readouterr().out
    assert "task_arithmetic" in out
    assert "lam = 1.0" in out
