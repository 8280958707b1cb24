"""The merge folder that grows: what it holds, and that it goes on from the disk bit for bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank, continual, load_adapter, save_adapter
from nscmerge.continual.folder import append_to, export, load_record, load_state, save_state, start_folder
from nscmerge.errors import OutputExistsError
from nscmerge.peft_format import Kind
from nscmerge.update import load_update

#: Methods that see neither data nor a model.
METHODS = [name for name, method in continual.METHODS.items() if "model" not in method.OBJECTS]
#: Without NUFILT's papercode, which is undefined for adapters.
CASES = [(m, v) for m in METHODS for v in continual.METHODS[m].VARIANTS if (m, v) != ("nufilt", "papercode")]
SHAPES = {"first": (40, 48), "second": (24, 40)}
SMALL = {"nufilt": {"filter_rank": 6, "adapter_rank": 5, "task_rank": 2}, "wudi": {"lr": 1e-3}}


def adapter(seed, rank=2, dtype=torch.float32, shapes=None):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_out, d_in) in (shapes or SHAPES).items():
        A, B = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
        layers[name] = LowRank(A.to(dtype), B.to(dtype), 0.5 + seed)
    return Adapter(layers, "base", name=f"task {seed}")


def make(method, variant="default"):
    return continual.make(method, variant, **SMALL.get(method, {}))


def bits(state):
    """Every tensor of a state, by name, as it lies in memory."""
    found = {}
    for name in state.shapes:
        weight = state.weight(name)
        parts = {"A": weight.A, "B": weight.B} if isinstance(weight, LowRank) else {"": weight}
        found |= {f"{name} {part}": tensor for part, tensor in parts.items()}
        if isinstance(weight, LowRank):
            found[f"{name} s"] = torch.tensor(weight.scaling, dtype=torch.float64)
    return found | {f"T {name}": tensor for name, tensor in state.tensors.items()}


def assert_same(a, b):
    """Two states are equal to the last bit, with everything that a next step or a receipt reads."""
    ours, theirs = bits(a), bits(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    plain = ("method", "variant", "t", "base_model")
    assert [getattr(a, name) for name in plain] == [getattr(b, name) for name in plain]
    for name in ("options", "scalars", "shapes", "kinds"):
        assert dict(getattr(a, name)) == dict(getattr(b, name))
    assert (list(a.layers), list(a.linear)) == (list(b.layers), list(b.linear))
    assert [(o.name, o.source, o.sha256, o.log, o.skipped) for o in a.absorbed] == [
        (o.name, o.source, o.sha256, o.log, o.skipped) for o in b.absorbed
    ]


@pytest.mark.parametrize(("method", "variant"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_goes_on_from_the_disk_bit_for_bit(method, variant, dtype, tmp_path):
    experts = [adapter(seed, rank, dtype) for seed, rank in enumerate((2, 7, 3))]
    made = make(method, variant)
    state = made.start(experts[0])
    assert_same(start_folder(tmp_path / "f", made, experts[0]), state)
    for expert in experts[1:]:
        state = made.append(state, expert)
        assert_same(append_to(tmp_path / "f", expert), state)
        assert_same(load_state(tmp_path / "f"), state)
        update, shown = made.update(state), load_update(tmp_path / "f")
        for name in SHAPES:
            torch.testing.assert_close(shown.delta(name), update.delta(name), rtol=1e-6, atol=1e-6)
        assert [one.name for one in shown.recipe.inputs] == [one.name for one in state.absorbed]


@pytest.mark.parametrize("method", METHODS)
def test_full_checkpoints_too(method, tmp_path):
    def checkpoint(seed):
        g = torch.Generator().manual_seed(seed)
        shapes = {"fc.weight": (12, 9), "fc.bias": (12,), "conv.weight": (4, 3, 2, 2), "embed.weight": (7, 9)}
        return Adapter(
            dense={name: torch.randn(shape, generator=g) for name, shape in shapes.items()},
            linear=["fc"],
            name=f"task {seed}",
        )

    made, experts = make(method), [checkpoint(seed) for seed in range(3)]
    state = made.start(experts[0])
    start_folder(tmp_path / "f", made, experts[0])
    for expert in experts[1:]:
        state = made.append(state, expert)
        append_to(tmp_path / "f", expert)
    assert_same(load_state(tmp_path / "f"), state)


def test_dense_weights_are_not_stored_twice(tmp_path):
    start_folder(tmp_path / "f", make("ties"), adapter(0))
    append_to(tmp_path / "f", adapter(1))
    step = tmp_path / "f" / "current"
    assert (step / "delta.safetensors").is_file()
    assert not (step / "state.safetensors").exists()
    assert load_state(tmp_path / "f").weight("first").dtype == torch.float32


def test_embeddings_convolutions_and_lost_layers(tmp_path):
    kinds = {"embed": Kind("embedding"), "conv": Kind("conv", (3, 2, 2))}
    shapes = {"conv": (5, 12), "embed": (11, 8), "q": (8, 8)}
    experts = [replace(adapter(seed, shapes=shapes), kinds=kinds) for seed in range(2)]
    # The second lacks a layer, which then is a zero update of it.
    experts[1] = replace(experts[1], layers={n: x for n, x in experts[1].layers.items() if n != "q"})
    for method in ("nufilt", "ties", "opcm"):
        made = make(method)
        start_folder(tmp_path / method, made, experts[0])
        state = made.append(made.start(experts[0]), experts[1])
        assert_same(append_to(tmp_path / method, experts[1]), state)
        assert dict(load_state(tmp_path / method).kinds) == kinds
        shown, update = load_update(tmp_path / method), made.update(state)
        for name in shapes:
            torch.testing.assert_close(shown.delta(name), update.delta(name), rtol=1e-6, atol=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (d_out, d_in) in SHAPES.items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))

    def forward(self, x):
        return self.second(self.first(x))


def test_peft_loads_the_folder_and_what_is_exported(tmp_path):
    made = make("nufilt")
    start_folder(tmp_path / "f", made, adapter(0))
    state = made.start(adapter(0))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    for seed in (1, 2):
        append_to(tmp_path / "f", adapter(seed))
        state = made.append(state, adapter(seed))
        base, update = Net(), made.update(state)
        want = base.second.weight + update.delta("second")
        want = x @ (base.first.weight + update.delta("first")).T @ want.T
        export(tmp_path / "f", tmp_path / f"e{seed}")
        for folder in (tmp_path / "f", tmp_path / f"e{seed}"):
            loaded = peft.PeftModel.from_pretrained(Net(), str(folder))
            torch.testing.assert_close(loaded(x), want, rtol=1e-4, atol=1e-3)
    assert sorted(p.name for p in (tmp_path / "e2").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "receipt.json",
    ]  # fmt: skip
    receipt = json.loads((tmp_path / "e2" / "receipt.json").read_text())
    assert receipt["extra"]["continual"]["t"] == 3
    losses = receipt["extra"]["continual"]["steps"][2]["log"]["first"]
    assert losses["loss_after"] < losses["loss_before"]
    with pytest.raises(OutputExistsError):
        export(tmp_path / "f", tmp_path / "e2")


def test_the_top_follows_when_a_method_leaves_the_factors(tmp_path):
    folder = tmp_path / "f"
    start_folder(folder, make("wudi"), adapter(0))
    assert load_adapter(folder).layers
    append_to(folder, adapter(1))
    assert not load_adapter(folder).layers
    assert sorted(load_adapter(folder).dense) == ["first.weight", "second.weight"]
    names = {p.name for p in folder.iterdir()}
    assert names == {"README.md", "current", "delta.safetensors", "receipt.json", "steps"}
    assert [p.name for p in (folder / "steps").iterdir()] == ["0002"]


def test_one_state_may_be_saved_twice_and_go_two_ways(tmp_path):
    made = make("opcm")
    state = made.append(made.start(adapter(0)), adapter(1))
    assert_same(save_state(state, tmp_path / "a"), state)
    again = save_state(load_state(tmp_path / "a"), tmp_path / "b")
    assert_same(append_to(tmp_path / "b", adapter(2)), made.append(state, adapter(2)))
    assert_same(load_state(tmp_path / "a"), state)
    assert again.t == 2
    assert list(load_record(tmp_path / "a").measures) == []
    with pytest.raises(OutputExistsError):
        save_state(state, tmp_path / "a")


def test_objects_that_no_folder_holds_are_given_at_each_step(tmp_path):
    g = torch.Generator().manual_seed(5)
    init = [{name: torch.randn(5, d_in, generator=g) for name, (_, d_in) in SHAPES.items()}]
    made = continual.make("nufilt", **SMALL["nufilt"], init=init)
    start_folder(tmp_path / "f", made, adapter(0))
    got = append_to(tmp_path / "f", adapter(1), init=init)
    assert_same(got, made.append(made.start(adapter(0)), adapter(1)))


def test_another_wrapping_of_the_base_model_is_the_same_layer(tmp_path):
    inner = {f"model.layers.0.{n}": x for n, x in adapter(0).layers.items()}
    outer = {f"model.language_model.layers.0.{n}": x for n, x in adapter(1).layers.items()}
    start_folder(tmp_path / "f", make("task_arithmetic"), Adapter(inner, "base", name="a"))
    state = append_to(tmp_path / "f", Adapter(outer, "base", name="b"))
    assert list(state.shapes) == sorted(inner)


@pytest.mark.parametrize("lost", [None, "current"])
def test_a_copy_with_links_followed_goes_on(lost, tmp_path):
    """Hubs, archives and ``cp -L`` make files of links; some lose the link to the directory."""
    start_folder(tmp_path / "f", make("nufilt"), adapter(0))
    append_to(tmp_path / "f", adapter(1))
    shutil.copytree(tmp_path / "f", tmp_path / "g", symlinks=False)
    assert not any(p.is_symlink() for p in (tmp_path / "g").iterdir())
    if lost:
        shutil.rmtree(tmp_path / "g" / lost)
    assert_same(load_state(tmp_path / "g"), load_state(tmp_path / "f"))
    assert_same(append_to(tmp_path / "g", adapter(2)), append_to(tmp_path / "f", adapter(2)))
    for folder in (tmp_path / "f", tmp_path / "g"):
        assert (folder / "current").is_symlink()
        assert [p.name for p in (folder / "steps").iterdir()] == ["0003"]
        assert load_update(folder).recipe.extra["continual"]["t"] == 3


def test_a_disk_without_links(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder, made = tmp_path / "f", make("wudi")
    state = made.start(adapter(0))
    start_folder(folder, made, adapter(0))
    assert load_adapter(folder).layers
    for seed in (1, 2):
        state = made.append(state, adapter(seed))
        assert_same(append_to(folder, adapter(seed)), state)
    assert (folder / "current").read_text() == "steps/0003\n"
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    assert {p.name for p in folder.iterdir()} == {"README.md", "current", "delta.safetensors", "receipt.json", "steps"}
    assert load_update(folder).recipe.extra["continual"]["t"] == 3


def test_the_folder_is_all_that_is_needed(tmp_path):
    """Append works when every earlier adapter is gone, and after the folder was moved."""
    paths = [save_adapter(adapter(seed), tmp_path / f"a{seed}") for seed in range(3)]
    made = make("knots_ties")
    start_folder(tmp_path / "f", made, paths[0])
    shutil.rmtree(paths[0])
    append_to(tmp_path / "f", paths[1])
    shutil.rmtree(paths[1])
    (tmp_path / "f").rename(tmp_path / "moved")
    state = append_to(tmp_path / "moved", paths[2])
    want = list(continual.steps([adapter(seed) for seed in range(3)], "knots_ties"))[-1]
    for name in SHAPES:
        torch.testing.assert_close(state.weight(name).dense(), want.weight(name).dense(), rtol=1e-6, atol=1e-6)
    assert all(len(one.sha256) == 64 for one in state.absorbed)
