"""What a merge hands back, and the folder that it writes."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from nscmerge import LowRank, Update
from nscmerge.errors import AdapterError, MethodError, OutputExistsError
from nscmerge.folders import sha256_file
from nscmerge.peft_format import Kind
from nscmerge.update import Input, Recipe, load_update


def low(rank=2, d_out=4, d_in=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 0.5)


def recipe(**options):
    return Recipe("svd", inputs=(Input("a", "owner/a", "0" * 64), Input("b")), options={"lam": 0.3}, **options)


def test_delta_includes_everything_in_fp32():
    half = torch.ones(4, 3, dtype=torch.bfloat16)
    update = Update({"l.low": low(), "l.full": half}, {"p.bias": torch.ones(2, dtype=torch.float64)})
    assert torch.equal(update.delta("l.low"), low().dense())
    assert update.delta("l.full").dtype == update.delta("p.bias").dtype == torch.float32
    assert update.delta("p.bias").tolist() == [1, 1]


def test_scaled_scales_everything_and_says_so():
    full = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    update = Update(
        {"l.low": low(), "l.full": full}, {"p": full}, per_task={"a": {"l.full": full}}, recipe=recipe()
    ).scaled(2.0)
    torch.testing.assert_close(update.delta("l.low"), 2 * low().dense())
    for got in (update.delta("l.full"), update.delta("p"), update.delta("l.full", "a")):
        assert torch.equal(got, 2 * full)
    assert update.recipe.options["lam"] == pytest.approx(0.6)


def test_delta_names_the_nearest():
    update = Update({"layers.0.q": low()}, recipe=recipe(skipped={"norm.weight": "no base"}))
    with pytest.raises(AdapterError, match=r"'layers.0.k'; did you mean 'layers.0.q'\? Known: layers.0.q"):
        update.delta("layers.0.k")
    with pytest.raises(AdapterError, match=r"'norm.weight' was skipped: no base"):
        update.delta("norm.weight")
    with pytest.raises(MethodError, match=r"task 'a' asked for.*one update for all tasks"):
        update.delta("layers.0.q", task="a")


def test_per_task_weights_come_first_and_survive_the_disk(tmp_path):
    per_task = {"a": {"l": low(seed=1)}, "b": {"l": torch.full((4, 3), 2.0), "p.bias": torch.ones(2)}}
    update = Update({"l": low()}, {"p.bias": torch.zeros(2)}, per_task=per_task, recipe=recipe())
    read = load_update(update.save(tmp_path / "out"))
    for it in (update, read):
        torch.testing.assert_close(it.delta("l", task="a"), low(seed=1).dense())
        torch.testing.assert_close(it.delta("l"), low().dense())
        assert it.delta("l", task="b").tolist() == [[2.0] * 3] * 4
        assert it.delta("p.bias", task="b").tolist() == [1, 1]
        with pytest.raises(MethodError, match=r"no task 'c'.*Known: a, b"):
            it.delta("l", task="c")
    with pytest.raises(AdapterError, match="cannot be a folder name"):
        Update({"l": low()}, per_task={"../a": {"l": low()}}).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.emb = nn.Linear(3, 4), nn.Conv1d(2, 4, 3), nn.Embedding(5, 6)


def test_a_low_rank_update_is_a_peft_adapter(tmp_path):
    layers = {"fc": low(), "conv": low(3, 4, 6), "emb": low(2, 5, 6)}
    kinds = {"conv": Kind("conv", (2, 3)), "emb": Kind("embedding")}
    update = Update(layers, base_model="owner/base", kinds=kinds, recipe=recipe(coefficients={"a": {"fc": 0.4}}))
    folder = update.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "receipt.json",
    ]
    model = PeftModel.from_pretrained(Net(), folder).base_model.model
    for name, layer in layers.items():
        delta = model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta.flatten(1), layer.dense())
    assert load_update(folder).kinds == kinds


def test_dense_layers_go_to_a_delta_file(tmp_path):
    full, kernel = torch.randn(4, 3), torch.randn(4, 6)
    layers = {"fc": full, "conv": kernel, "other": low()}
    update = Update(layers, {"p.bias": torch.ones(2)}, kinds={"conv": Kind("conv", (2, 3))}, recipe=recipe())
    folder = update.save(tmp_path / "out")
    deltas = load_file(folder / "delta.safetensors")
    assert {name: tuple(t.shape) for name, t in deltas.items()} == {
        "fc.weight": (4, 3),
        "conv.weight": (4, 2, 3),
        "p.bias": (2,),
    }
    net = Net()
    before = net.fc.weight.detach().clone()
    dict(net.named_parameters())["fc.weight"].data += deltas["fc.weight"]  # as the card says
    torch.testing.assert_close(net.fc.weight.detach() - before, full)
    card = (folder / "README.md").read_text()
    assert "delta.safetensors" in card
    assert "Both parts are needed" in card
    read = load_update(folder)
    assert sorted(read.layers) == ["conv", "fc", "other"]
    assert torch.equal(read.delta("conv"), kernel)
    assert list(read.dense) == ["p.bias"]


def test_only_dense_layers_need_no_adapter(tmp_path):
    folder = Update({"fc": torch.ones(2, 2)}, base_model="owner/base", recipe=recipe()).save(tmp_path / "out")
    assert not (folder / "adapter_config.json").exists()
    assert "there is no PEFT adapter here" in (folder / "README.md").read_text()
    read = load_update(folder)
    assert read.base_model == "owner/base"
    assert read.delta("fc").tolist() == [[1, 1], [1, 1]]


def test_receipt_and_card_say_where_it_came_from(tmp_path):
    wide = LowRank(torch.cat([low().A] * 2), torch.cat([low().B] * 2, dim=1))
    made = recipe(
        coefficients={"a": {"l": 0.25, "m": 0.75}, "b": {"l": None, "m": 1.0}},
        seed=7,
        seconds=1.5,
        relative_error={"l": 0.125},
        skipped={"norm.weight": "no base"},
        notes=("A note.",),
        extra={"mask": torch.ones(2, dtype=torch.bool)},
    )
    folder = Update({"l": wide, "m": low()}, base_model="owner/base", recipe=made).save(tmp_path / "out")
    content = json.loads((folder / "receipt.json").read_text())
    assert content["inputs"][0] == {"name": "a", "source": "owner/a", "sha256": "0" * 64}
    assert (content["method"], content["variant"], content["options"]) == ("svd", "original", {"lam": 0.3})
    assert content["coefficients"]["b"] == {"l": None, "m": 1.0}
    assert (content["seed"], content["seconds"], content["relative_error"]) == (7, 1.5, {"l": 0.125})
    assert content["layers"]["l"] | {"kind": None} == {
        "kind": None,
        "shape": [4, 3],
        "rank": 4,
        "numerical_rank": 2,
    }
    assert {"python", "torch", "peft", "transformers", "nscmerge"} <= set(content["versions"])
    assert content["extra"]["mask"]["tensor"] == [2]
    assert content["files"]["adapter_model.safetensors"] == sha256_file(folder / "adapter_model.safetensors")
    card = (folder / "README.md").read_text()
    for text in ('base_model: "owner/base"', "`svd`", "| a | owner/a |", "| a | 2 | 0.5000 | 0.2500 | 0.7500 |"):
        assert text in card
    for text in ("A note.", "`norm.weight`: no base", "PeftModel.from_pretrained", "check each of them"):
        assert text in card
    read = load_update(folder).recipe
    assert (read.inputs, read.seed, read.coefficients) == (made.inputs, 7, made.coefficients)


def test_a_plain_adapter_folder_is_an_update_without_recipe(tmp_path):
    folder = Update({"l": low()}).save(tmp_path / "out")
    (folder / "receipt.json").unlink()
    read = load_update(folder)
    assert read.recipe is None
    torch.testing.assert_close(read.delta("l"), low().dense())


def test_damage_and_existing_folders_are_named(tmp_path):
    folder = Update({"l": low()}).save(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="is there already"):
        Update({"l": low()}).save(folder)
    (folder / "receipt.json").write_text("{")
    with pytest.raises(AdapterError, match=r"receipt.json is damaged"):
        load_update(folder)
    with pytest.raises(AdapterError, match=r"none is not there"):
        load_update(tmp_path / "none")
    with pytest.raises(AdapterError, match="no low-rank layer"):
        Update({}).save(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
