import json

import pytest
import torch
from lightning import Trainer
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge.adapters import Adapter, save_adapter
from nscmerge.candidates import ClosedForm, merge_layers
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.factors import LowRank
from nscmerge.merging import merge
from nscmerge.update import Update
from tasks.benchmark import Benchmark
from tasks.classification import TextClassification
from tasks.metrics import accuracy, normalized_score, pearson
from tasks.regression import TextRegression
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert

LAYERS = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.output.dense"]


def update(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, WIDTH), (WIDTH, rank)
    return {name: LowRank(*(torch.randn(s, generator=generator) for s in shapes), 0.5) for name in LAYERS}


def heads():
    torch.manual_seed(1)
    return {"topic.a": TextClassification(2, WIDTH), "rating": TextRegression(WIDTH)}


def data(order=("topic.a", "rating")):
    tasks = {"topic.a": FakeTextDataModule(classes=True, seed=1), "rating": FakeTextDataModule(seed=2, size=17)}
    return JointDataModule({name: tasks[name] for name in order}, test_batch_size=7)


@pytest.fixture
def folders(tmp_path):
    """Two experts with heads, and one merge that is any adapter."""
    for seed, (name, task) in enumerate(heads().items()):
        save_adapter(Adapter(update(seed), "someone/tiny", head=task.state_dict(), name=name), tmp_path / name)
    save_adapter(Adapter(update(9), "someone/tiny", name="merged"), tmp_path / "merged")
    return {name: tmp_path / name for name in ("topic.a", "rating", "merged")}


def benchmark(folders, model=None, **options):
    experts = {name: folders[name] for name in ("topic.a", "rating")}
    return Benchmark(model or tiny_bert(), heads(), experts, {"ours": folders["merged"]}, **options)


def run(module, datamodule, **options):
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", **options).test(module, datamodule=datamodule, verbose=False)
    return module.scores


def by_hand(name, layers):
    """Predict sample by sample with the weights added to the base, and score with the pure functions."""
    model, task = tiny_bert(), heads()[name]
    for layer, factors in layers.items():
        model.get_submodule(layer).weight += factors.dense()
    samples = data().tasks[name].dataset("test")
    with torch.no_grad():
        rows = [samples[i] for i in range(len(samples))]
        predictions = torch.cat([task(model, {k: v[None] for k, v in row.items() if k != "target"}) for row in rows])
    targets = torch.stack([row["target"] for row in rows])
    return float(accuracy(predictions, targets) if name == "topic.a" else pearson(predictions, targets))


@pytest.mark.parametrize("order", [("topic.a", "rating"), ("rating", "topic.a")])
def test_numbers_equal_those_computed_by_hand(folders, tmp_path, capsys, order):
    scores = run(benchmark(folders, output=tmp_path / "scores"), data(order))
    own = {"topic.a": update(0), "rating": update(1)}
    for name in own:
        expected = {"base": by_hand(name, {}), "expert": by_hand(name, own[name]), "ours": by_hand(name, update(9))}
        for row in scores.rows:
            assert scores.value(row, name) == pytest.approx(expected[row.name], abs=1e-5)
            normalized = normalized_score(expected[row.name], expected["expert"], True)
            assert row.normalized[name] == pytest.approx(normalized, rel=1e-3)
    content = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert list(content["candidates"]) == ["base", "expert", "ours"]
    assert {name: info["samples"] for name, info in content["tasks"].items()} == {"topic.a": 24, "rating": 17}
    assert "expert (absolute)" in capsys.readouterr().out


def test_a_merge_may_be_named_by_its_method_instead_of_a_folder(folders, tmp_path):
    experts = {name: folders[name] for name in ("topic.a", "rating")}
    folder = merge(experts, "svd", lam=0.7, rank=1).save(tmp_path / "svd")
    given = {"folder": folder, "method": ClosedForm("svd", 0.7, options={"rank": 1})}
    scores = run(Benchmark(tiny_bert(), heads(), experts, given, output=tmp_path / "scores"), data())
    rows = {row.name: row.normalized for row in scores.rows}
    assert rows["method"] == pytest.approx(rows["folder"], rel=1e-6)
    recorded = json.loads((tmp_path / "scores" / "scores.json").read_text())["merges"]["method"]
    assert recorded == {"method": "svd", "lam": 0.7, "variant": "original", "options": {"rank": 1}}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folders, tmp_path):
    # 17 samples on 2 processes: an uneven share, of which Lightning's own sampler would count one twice.
    contents = []
    for devices, strategy in ((1, "auto"), (2, "ddp_spawn")):
        output = tmp_path / f"on{devices}"
        run(benchmark(folders, output=output), data(), devices=devices, strategy=strategy)
        contents.append(json.loads((output / "scores.json").read_text()))
    assert contents[0]["tasks"] == contents[1]["tasks"]
    for name, candidate in contents[0]["candidates"].items():
        for task, cell in candidate["tasks"].items():
            again = contents[1]["candidates"][name]["tasks"][task]
            assert again["metrics"] == pytest.approx(cell["metrics"], abs=1e-6)


def test_the_base_model_is_left_as_it_was(folders):
    model = tiny_bert()
    tensors = list(model.state_dict().values())
    before = [tensor.clone() for tensor in tensors]
    module = benchmark(folders, model)
    assert run(module, data()) == run(module, data())  # a second test starts anew
    assert all(map(torch.equal, tensors, before))


def test_weights_per_task_are_given_to_their_task():
    model, dense = tiny_bert(), torch.ones(WIDTH, WIDTH)
    kept = Update({}, per_task={"a": {LAYERS[0]: dense}, "b": {f"{LAYERS[0]}.weight": 2 * dense}})
    found = merge_layers(model, kept, ["a", "b"], "emr")
    assert torch.equal(found["a"][LAYERS[0]], dense)
    assert torch.equal(found["b"][LAYERS[0]], 2 * dense)
    with pytest.raises(AdapterError, match=r"merge 'emr' keeps weights per task, for a, b, but not for c"):
        merge_layers(model, kept, ["a", "c"], "emr")


def test_dense_deltas_of_linear_weights_are_switched_on_and_others_refused():
    model, low_rank = tiny_bert(), update(0)
    delta = torch.ones(WIDTH, WIDTH)
    (layers,) = merge_layers(model, Update(low_rank, {f"{LAYERS[0]}.weight": delta}), ["a"], "x").values()
    torch.testing.assert_close(layers[LAYERS[0]], low_rank[LAYERS[0]].dense() + delta)
    with pytest.raises(AdapterError, match=r"merge 'x' changes 'embeddings.LayerNorm.shift', and the base model Bert"):
        merge_layers(model, Update(low_rank, {"embeddings.LayerNorm.shift": torch.ones(WIDTH)}), ["a"], "x")


def test_names_must_agree_before_any_work(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"experts and tasks .* only in experts: \[\], only in tasks: \['rating'\]"):
        Benchmark(tiny_bert(), heads(), {"topic.a": folders["topic.a"]})
    with pytest.raises(ConfigError, match="'base', which the table uses itself"):
        Benchmark(tiny_bert(), heads(), {n: folders[n] for n in heads()}, {"base": folders["merged"]})
    module = benchmark(folders, nn.Linear(1, 1))  # never touched
    with pytest.raises(
        ConfigError, match=r"data and benchmark .* only in data: \['x'\], only in benchmark: \['rating'"
    ):
        run(module, JointDataModule({"x": FakeTextDataModule()}))


def test_an_expert_without_head_and_a_foreign_merge_are_refused(folders, tmp_path):
    with pytest.raises(AdapterError, match=r"expert 'rating' .* no head.safetensors"):
        run(benchmark({**folders, "rating": folders["merged"]}), data())
    save_adapter(Adapter(update(9), "someone/else", name="merged"), tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"merge 'ours' was made for the base model 'someone/else'"):
        run(benchmark({**folders, "merged": tmp_path / "foreign"}), data())
