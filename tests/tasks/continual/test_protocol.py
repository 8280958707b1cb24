"""The protocol on tiny tasks: every number by hand, tasks not seen yet left out, resumed runs equal whole ones."""

import json

import pytest
import torch
from lightning import Trainer
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge import Adapter, continual
from nscmerge.continual.surrogates import second_moment
from nscmerge.errors import ConfigError, MethodError
from tasks.classification import TextClassification
from tasks.continual import protocol, steps
from tasks.continual.module import ContinualBenchmark, ContinualForm
from tasks.continual.moments import input_moments
from tasks.metrics import accuracy, normalized_score, pearson
from tests.fakes.continual_suite import LAYERS, METHODS, ORDERS, TASKS, data, heads, module, run, update, write_experts
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert


@pytest.fixture
def folder(tmp_path):
    return write_experts(tmp_path)


def by_hand(task, delta):
    """Predict sample by sample with the weights added to the base, and score with the pure functions."""
    model, head = tiny_bert(), heads()[task]
    for layer in LAYERS:
        model.get_submodule(layer).weight += delta(layer)
    samples = data().tasks[task].dataset("test")
    rows = [samples[i] for i in range(len(samples))]
    with torch.no_grad():
        found = torch.cat([head(model, {k: v[None] for k, v in row.items() if k != "target"}) for row in rows])
    targets = torch.stack([row["target"] for row in rows])
    return float(pearson(found, targets) if task == "rating" else accuracy(found, targets))


def test_every_score_equals_the_one_by_hand(folder):
    results = run(module(folder, activations=6))
    experts = {name: Adapter(update(i), name=name) for i, name in enumerate(TASKS)}
    expert = {name: by_hand(name, lambda layer, n=name: experts[n].layers[layer].dense()) for name in TASKS}
    assert results.expert == pytest.approx(expert, abs=1e-5)
    assert results.base == pytest.approx({name: by_hand(name, lambda layer: 0) for name in TASKS}, abs=1e-5)
    for name, form in METHODS.items():
        for one, order in zip(results.of(name), ORDERS, strict=True):
            updates = continual.run([experts[t] for t in order], form.method, **form.options)
            for t, row in enumerate(one.rows):
                assert list(row.scores) == order[: t + 1]
                wanted = {task: by_hand(task, updates[t].delta) for task in order[: t + 1]}
                assert row.scores == pytest.approx(wanted, abs=1e-5)
            assert set(one.rows[-1].losses) == {"stability", "plasticity", "data_stability", "data_plasticity"}
    (first, _) = results.of("half")
    last = [normalized_score(by_hand(t, updates[-1].delta), expert[t], True) for t in ORDERS[1]]
    assert results.matrix(results.of("magmax")[1], True)[-1] == pytest.approx(last, rel=1e-3)
    assert first.rows[0].parameters == 2 * 2 * (WIDTH + WIDTH)


def test_a_stopped_protocol_goes_on_to_the_same_results(folder, monkeypatch):
    whole = run(module(folder, output=folder / "whole", activations=6))
    counted = []
    real = ContinualBenchmark.score

    def stops(self, trainer, data, update, tasks):
        counted.append(list(tasks))
        if len(counted) == limit:
            raise KeyboardInterrupt
        return real(self, trainer, data, update, tasks)

    monkeypatch.setattr(ContinualBenchmark, "score", stops)
    # 1 test of the base, 3 of experts, 18 of steps: stopped within the experts, in a run, and between two.
    for limit in (3, 7, 5):  # noqa: B007
        counted.clear()
        with pytest.raises(KeyboardInterrupt):
            run(module(folder, activations=6))
    counted.clear()
    limit = 0
    again = run(module(folder, activations=6))
    assert len(counted) == 18 - 2 - 4
    for one, other in zip(again.runs, whole.runs, strict=True):
        assert one.order == other.order
        for mine, theirs in zip(one.rows, other.rows, strict=True):
            assert mine.scores == theirs.scores
            assert mine.losses == theirs.losses
    counted.clear()
    assert run(module(folder, activations=6)).acc("nufilt") == whole.acc("nufilt")
    assert counted == []


def test_results_of_another_protocol_are_not_mixed_in(folder):
    few = {"half": METHODS["half"]}
    run(module(folder, few))
    with pytest.raises(ConfigError, match=r"order_1.json was made with options {'lam': 0.5}; now options is {'lam': 0"):
        run(module(folder, {"half": ContinualForm("task_arithmetic")}))
    with pytest.raises(ConfigError, match=r"order_1.json was made with order \['mood'.*Name the method differently"):
        run(module(folder, few, orders=1))
    other = module(folder, few)
    other.experts["mood"] = str(folder / "rating")
    with pytest.raises(ConfigError, match=r"reference.json: experts of the results there differ"):
        run(other)
    # More methods and more orders are welcome.
    more = {**few, "average": ContinualForm("weight_average")}
    assert run(module(folder, more, orders=[*ORDERS, TASKS])).methods == ["half", "average"]


def test_order_free_methods_end_alike(folder):
    results = run(module(folder, {"average": ContinualForm("weight_average"), "magmax": ContinualForm("magmax")}))
    for name in results.methods:
        assert results.acc(name, True).std == pytest.approx(0.0, abs=1e-4)


def test_wrong_options_are_refused_before_any_work(folder):
    with pytest.raises(MethodError, match="no continual method 'nufit'; did you mean 'nufilt'"):
        module(folder, {"x": ContinualForm("nufit")})
    with pytest.raises(MethodError, match="no option 'filter_rang'; did you mean 'filter_rank'"):
        module(folder, {"x": ContinualForm("nufilt", options={"filter_rang": 3})})
    with pytest.raises(ConfigError, match="no methods to test"):
        module(folder, {})
    with pytest.raises(ConfigError, match="activations is -1"):
        module(folder, activations=-1)
    with pytest.raises(ConfigError, match=r"a pattern that holds {task}"):
        ContinualBenchmark(tiny_bert(), heads(), "experts/", METHODS, folder / "out")


def test_moments_are_those_of_the_inputs_that_the_expert_sees(folder):
    one = module(folder)
    found = input_moments(one, data(), 6)
    model = tiny_bert()
    for layer, factors in update(1).items():
        model.get_submodule(layer).weight += factors.dense()
    seen = []
    model.get_submodule(LAYERS[1]).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    samples = data().tasks["rating"].dataset("val")
    for i in range(6):
        row = samples[i * len(samples) // 6]
        model(**{k: v[None] for k, v in row.items() if k != "target"})
    torch.testing.assert_close(
        found["rating"][LAYERS[1]].double(), second_moment(torch.cat(seen)), rtol=1e-4, atol=1e-5
    )
    assert set(found) == set(TASKS)


def test_whole_checkpoints_are_experts_too(tmp_path):
    """Norms and biases change with them; what a method leaves alone stays the base model's."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        model = tiny_bert()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
    torch.manual_seed(1)
    tasks = {"one": MeanSign(), "two": MeanSign()}
    joint = JointDataModule({n: FakeTextDataModule(classes=True, seed=i) for i, n in enumerate(tasks)})
    methods = {
        "average": ContinualForm("weight_average"),
        "nufilt": ContinualForm("nufilt", options={"layers": ["*query"], "filter_rank": 4}),
    }
    one = ContinualBenchmark(
        str(tmp_path / "base"),
        tasks,
        f"{tmp_path}/{{task}}",
        methods,
        tmp_path / "out",
        orders=1,
        checkpoint_class="BertModel",
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    results = protocol.run(trainer, one, joint)
    assert results.methods == ["average", "nufilt"]
    expert = one.expert("two")
    assert "pooler.dense" in expert.linear
    assert "embeddings.LayerNorm.weight" in expert.dense
    assert "embeddings.LayerNorm" not in expert.linear
    # The average of one expert is that expert.
    row = results.of("average")[0].rows[0]
    assert row.scores[row.task] == pytest.approx(results.expert[row.task], abs=1e-6)
    assert json.loads((tmp_path / "out" / "reference.json").read_text())["origin"]["checkpoint_class"] == "BertModel"


class MeanSign(TextClassification):
    """Two classes by the sign of the mean feature; a head without weights, as zero-shot heads have none."""

    def __init__(self):
        super().__init__(2, WIDTH)
        self.linear = nn.Identity()

    def config(self):
        return {"class_path": "MeanSign"}

    def predict(self, features, inputs):
        mean = features[:, : WIDTH // 2].mean(1)
        return torch.stack([mean, -mean], 1)


def test_losses_of_a_step_are_means_over_layers():
    experts = [Adapter(update(i), name=str(i)) for i in range(2)]
    first, second = continual.steps(experts, "nufilt", adapter_rank=4)
    found = steps.step_losses(first, second, experts[1], ["0", "1"])
    log = second.absorbed[-1].log
    for ours, theirs in (("stability", "stability_after"), ("plasticity", "plasticity_after")):
        mean = sum(log[layer][theirs] for layer in LAYERS) / len(LAYERS)
        assert found[ours] == pytest.approx(mean, rel=1e-6)  # NUFILT's own losses, computed another way
