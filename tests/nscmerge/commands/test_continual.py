"""``nscmerge continual`` as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nscmerge import Adapter, LowRank, continual, save_adapter
from nscmerge.cli import main
from nscmerge.update import load_update


@pytest.fixture
def experts(tmp_path):
    paths = []
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        layers = {"blocks.0.q": LowRank(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), 2.0)}
        paths.append(save_adapter(Adapter(layers, "base", name=f"t{k}"), tmp_path / f"t{k}"))
    return paths


def command(*args):
    main(["continual", *map(str, args)])


def stopped(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        command(*args)
    return stop.value.code, capsys.readouterr().err


def test_start_append_show_export(experts, tmp_path, capsys):
    folder = tmp_path / "f"
    command("start", "nufilt", "--adapter", experts[0], "--output", folder, "--filter_rank", 1, "--steps", 7)
    assert f"the next: nscmerge continual append {folder}" in capsys.readouterr().out
    command("append", folder, "--adapter", experts[1])
    command("append", folder, "--adapter", f"last={experts[2]}")
    assert "holds 3 experts now: t0, t1, last" in capsys.readouterr().out
    command("show", folder, "--format", "json")
    found = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in found["steps"]] == ["t0", "t1", "last"]
    assert found["options"]["filter_rank"] == 1
    assert found["options"]["steps"] == 7
    command("show", folder, "--all_layers")
    assert "blocks.0.q" in capsys.readouterr().out
    command("export", folder, "--output", tmp_path / "merge")
    want = continual.run(dict(zip(["t0", "t1", "last"], experts, strict=True)), "nufilt", filter_rank=1, steps=7)[-1]
    got = load_update(tmp_path / "merge")
    torch.testing.assert_close(got.delta("blocks.0.q"), want.delta("blocks.0.q"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [m for m, kind in continual.METHODS.items() if "model" not in kind.OBJECTS])
def test_every_method_starts_and_takes_its_options(method, experts, tmp_path):
    folder = tmp_path / "f"
    command("start", method, "--adapter", experts[0], "--output", folder, "--variant", "default")
    command("append", folder, "--adapter", experts[1])
    want = continual.run(experts[:2], method)[-1].delta("blocks.0.q")
    torch.testing.assert_close(load_update(folder).delta("blocks.0.q"), want, rtol=1e-6, atol=1e-6)


def test_options_of_every_kind(experts, tmp_path):
    command("start", "ties", "--adapter", experts[0], "--output", tmp_path / "a", "--agg", "mean", "--lam", "0.5")
    command("start", "nufilt", "--adapter", experts[0], "--output", tmp_path / "b", "--layers", '["*q"]')
    command("start", "wudi", "--adapter", experts[0], "--output", tmp_path / "c", "--rank", "2")
    options = [json.loads((tmp_path / f / "current" / "state.json").read_text())["options"] for f in "abc"]
    assert (options[0]["agg"], options[0]["lam"]) == ("mean", 0.5)
    assert options[1]["layers"] == ["*q"]
    assert options[2]["rank"] == 2


def test_nothing_is_measured_if_not_wanted(experts, tmp_path, capsys):
    folder = tmp_path / "f"
    command("start", "ties", "--adapter", experts[0], "--output", folder, "--measure", "false")
    command("append", folder, "--adapter", experts[1], "--measure", "false")
    command("append", folder, "--adapter", experts[2])
    capsys.readouterr()
    command("show", folder, "--format", "json")
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["layers"] for step in steps] == [0, 0, 1]
    assert [step["plasticity"] is None for step in steps] == [True, True, False]


def test_a_checkpoint_of_the_whole(experts, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
    save_file({"blocks.0.q.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    command("start", "task_arithmetic", "--adapter", experts[0], "--output", tmp_path / "f")
    command("export", tmp_path / "f", "--output", tmp_path / "full", "--fold-into", base)
    assert "checkpoint with 1 experts written to" in capsys.readouterr().out
    got = load_file(tmp_path / "full" / "model.safetensors")["blocks.0.q.weight"]
    torch.testing.assert_close(got, weight + load_update(tmp_path / "f").delta("blocks.0.q"))


def test_whole_tensors_with_their_base(tmp_path, capsys):
    layers = {"q": LowRank(torch.ones(1, 4), torch.ones(3, 1))}
    saved = {"projector.weight": torch.full((2, 3), 5.0)}
    save_adapter(Adapter(layers, "base", saved=saved, modules_to_save=["projector"], name="a"), tmp_path / "a")
    save_file({"projector.weight": torch.full((2, 3), 4.0)}, tmp_path / "base.safetensors")
    start = ("start", "task_arithmetic", "--lam", "0.5", "--adapter", tmp_path / "a")
    with pytest.warns(UserWarning, match="1 tensors not merged"):
        command(*start, "--output", tmp_path / "without")
    command(*start, "--output", tmp_path / "with", "--base", tmp_path / "base.safetensors")
    assert load_update(tmp_path / "with").delta("projector.weight").tolist() == [[0.5] * 3] * 2
    assert "projector.weight" not in load_update(tmp_path / "without").dense


@pytest.fixture
def checkpoints(tmp_path):
    """A base and three fine-tuned checkpoints: two linear layers, an embedding, a norm, a head of the task's own."""
    shapes = {"fc1.weight": (8, 6), "fc1.bias": (8,), "fc2.weight": (6, 8), "embed.weight": (9, 6), "norm.weight": (6,)}
    folders = []
    for k in range(4):
        g = torch.Generator().manual_seed(k)
        tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        tensors |= {"classifier.weight": torch.ones(2, 6)} if k else {}
        tensors |= {"steps": torch.tensor([k])}
        (tmp_path / f"c{k}").mkdir()
        save_file(tensors, tmp_path / f"c{k}" / "model.safetensors", metadata={"format": "pt"})
        folders.append(tmp_path / f"c{k}")
    return folders


@pytest.mark.parametrize("method", ["opcm", "weight_average", "iso_c", "nufilt", "knots_ties"])
def test_whole_checkpoints(method, checkpoints, tmp_path):
    base, *experts = checkpoints
    weights = [load_file(folder / "model.safetensors") for folder in checkpoints]
    folder, linear = tmp_path / "f", ("--linear", '["fc*"]')
    command("start", method, "--adapter", experts[0], "--base", base, *linear, "--output", folder)
    for expert in experts[1:]:
        command("append", folder, "--adapter", expert, "--base", base)
    names = [name for name in weights[0] if name != "steps"]
    memory = [
        Adapter(dense={n: w[n] - weights[0][n] for n in names}, linear=["fc1", "fc2"], name=f"c{k}")
        for k, w in enumerate(weights)
    ][1:]
    want, got = continual.run(memory, method)[-1], load_update(folder)
    for name in names:
        torch.testing.assert_close(got.delta(name), want.delta(name), rtol=0, atol=0)
    assert got.recipe.skipped == {"classifier.weight": "task heads are never merged; every task keeps its own"}


def test_whole_checkpoints_that_do_not_fit(checkpoints, experts, tmp_path, capsys):
    base, one, *_ = checkpoints
    start = ("start", "opcm", "--output", tmp_path / "x", "--adapter")
    save_file({"fc1.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other.safetensors").rename(tmp_path / "other" / "model.safetensors")
    for args, said in [
        ((*start, one), "give --base with the model that it was fine-tuned from"),
        ((*start, one, "--base", base), "nothing says which of its 3 matrices are"),
        ((*start, one, "--base", base, "--linear", '["f1"]'), "no matrix 'f1'; did you mean 'fc1'"),
        ((*start, tmp_path / "other", "--base", base), "'fc1.weight' is (3, 3), the base model's (8, 6)"),
        ((*start, one, "--base", experts[0]), "the base checkpoint has no tensor"),
    ]:
        code, err = stopped(capsys, *args)
        assert (code, said in err) == (1, True), err
    assert not (tmp_path / "x").exists()


def test_errors_are_one_line(experts, tmp_path, capsys):
    folder = tmp_path / "f"
    command("start", "opcm", "--adapter", experts[0], "--output", folder)
    for args, said in [
        (("start", "opcm", "--adapter", experts[0], "--output", folder), "is there already and nothing is overwritten"),
        (("start", "opcm", "--adapter", tmp_path / "no/where/at/all", "--output", tmp_path / "x"), "neither a folder"),
        (("start", "opcm", "--adapter", experts[0], "--output", tmp_path / "x", "--alpha", 2), "alpha is 2.0"),
        (("append", folder, "--adapter", experts[0]), "task 't0' is already in this merge"),
        (("append", tmp_path / "g", "--adapter", experts[0]), "is not there"),
        (("append", experts[0], "--adapter", experts[1]), "is no growing merge folder"),
        (("show", experts[0]), "is no growing merge folder"),
        (("export", folder, "--output", experts[0]), "is there already"),
        (("export", folder, "--output", tmp_path / "x", "--dtype", "float16"), "give --fold-into BASE"),
    ]:
        code, err = stopped(capsys, *args)
        assert (code, said in err) == (1, True), err
        assert err.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()


def test_wrong_usage(experts, tmp_path, capsys):
    for args, said in [
        (("start", "nufil", "--adapter", experts[0], "--output", tmp_path / "x"), "nufilt"),
        (("start", "opcm", "--adapter", experts[0], "--output", tmp_path / "x", "--steps", 3), "--steps"),
        (("append", tmp_path / "x"), "adapter"),
        (("grow",), "start"),
    ]:
        code, err = stopped(capsys, *args)
        assert code == 2
        assert said in err


def test_methods_that_need_a_model_are_named_and_not_offered(capsys):
    with pytest.raises(SystemExit):
        command("start", "--help")
    out = " ".join(capsys.readouterr().out.split())
    learned = [name for name, method in continual.METHODS.items() if "model" in method.OBJECTS]
    assert f"({', '.join(learned)}): Python only" in out
    assert not any(f" {name} M_t" in out for name in learned)
