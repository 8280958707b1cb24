"""Benchmark and search with shared batches: the numbers of one pass per task, from fewer passes."""

import json

import pytest
import torch
from lightning import Trainer

from nscmerge.adapters import Adapter, save_adapter
from nscmerge.candidates import ClosedForm
from nscmerge.errors import ConfigError
from nscmerge.search import Grid, NullSpaceRatio, ScaleSearch
from tasks.benchmark import Benchmark
from tasks.classification import TextClassification
from tasks.regression import TextRegression
from tasks.search import Loss, Score
from tests.fakes.fit_merge import adapters
from tests.fakes.pools import pooled_data
from tests.fakes.text_tasks import WIDTH, tiny_bert

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
MERGES = {"task_arithmetic": ClosedForm("task_arithmetic", 0.3), "emr": ClosedForm("emr")}


def heads():
    torch.manual_seed(1)
    return {"a": TextClassification(2, WIDTH), "b": TextRegression(WIDTH), "c": TextClassification(2, WIDTH)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, adapter in adapters(tiny_bert()).items():
        head = heads()[name].state_dict()
        found[name] = tmp_path_factory.mktemp("experts") / name
        save_adapter(Adapter(adapter.layers, "someone/tiny", head=head, name=name), found[name])
    return found


def counted():
    """Return a model that counts its passes."""
    model, passes = tiny_bert(), []
    model.register_forward_pre_hook(lambda m, args: passes.append(1))
    return model, passes


def scores(folders, share, merges=MERGES, groups=None):
    model, passes = counted()
    benchmark = Benchmark(model, heads(), folders, merges, groups=groups)
    Trainer(**QUIET).test(benchmark, datamodule=pooled_data(share), verbose=False)
    return benchmark.scores, len(passes)


def test_the_scores_are_those_of_one_pass_per_task(folders):
    (shared, passes), (apart, all_passes) = scores(folders, True), scores(folders, False)
    assert shared.tasks == apart.tasks
    for row, expected in zip(shared.rows, apart.rows, strict=True):
        assert row.name == expected.name
        for task in "abc":
            assert row.values[task] == pytest.approx(expected.values[task], rel=1e-5)
    # Batches of 5: two for 'a' and 'b', which share, three for 'c'. The base and task arithmetic need one pass each for
    # a shared batch, experts and EMR have weights per task.
    assert passes == 2 * (2 + 3) + 2 * (2 + 2 + 3)
    assert all_passes == 4 * (2 + 2 + 3)


def test_groups_and_the_experts_that_are_merged(folders):
    seen = {"seen": ClosedForm("task_arithmetic", 0.3, only=["a", "b"]), "all": ClosedForm("task_arithmetic", 0.3)}
    found, _ = scores(folders, True, seen, groups={"a": "seen", "b": "seen", "c": "unseen"})
    rows = {row.name: row for row in found.rows}
    assert rows["seen"].values != rows["all"].values
    for row in found.rows:
        means = found.group_means(row)
        assert means["seen"] == pytest.approx((row.normalized["a"] + row.normalized["b"]) / 2)
        assert means["unseen"] == pytest.approx(row.normalized["c"])
    with pytest.raises(ConfigError, match=r"to merge \['x'\] only; there are the experts \['a', 'b', 'c'\]"):
        scores(folders, True, {"seen": ClosedForm("svd", only=["a", "x"])})
    with pytest.raises(ConfigError, match=r"groups are given for \['x'\]"):
        scores(folders, True, groups={"x": "seen"})


def search(share):
    model, passes = counted()
    criteria = {"loss": Loss(heads(), samples=8, batch_size=4), "omega": NullSpaceRatio(1)}
    experts = {n: Adapter(a.layers, "tiny", head=heads()[n].state_dict()) for n, a in adapters(tiny_bert()).items()}
    methods = {name: ClosedForm(name) for name in MERGES}
    found = ScaleSearch(model, experts, methods, criteria, Grid(0.2, 0.6, 0.2, None), judge=Score(heads()))
    return found.run(Trainer(**QUIET), pooled_data(share)), len(passes)


def test_a_search_finds_the_same_values(folders):
    (shared, passes), (apart, all_passes) = search(True), search(False)
    for entry, expected in zip(shared.methods, apart.methods, strict=True):
        assert entry.choices() == expected.choices()
        for curve, other in zip(
            [*entry.curves.values(), entry.judged], [*expected.curves.values(), expected.judged], strict=True
        ):
            assert curve.points.keys() == other.points.keys()
            for lam, point in curve.points.items():
                assert point.tasks == pytest.approx(other.points[lam].tasks, rel=1e-4)
    assert passes < all_passes
    assert shared.origin["criteria"]["loss"]["samples"]["tasks"] == {"a": 8, "b": 8, "c": 8}


@pytest.mark.slow
def test_two_processes_share_a_pool_and_give_the_numbers_of_one(folders, tmp_path):
    contents = []
    for devices, strategy in ((1, "auto"), (2, "ddp_spawn")):
        output = tmp_path / f"on{devices}"
        benchmark = Benchmark(tiny_bert(), heads(), folders, MERGES, output=output)
        trainer = Trainer(**(QUIET | {"devices": devices, "strategy": strategy}))
        trainer.test(benchmark, datamodule=pooled_data(True), verbose=False)
        contents.append(json.loads((output / "scores.json").read_text()))
    assert contents[0]["tasks"] == contents[1]["tasks"]
    for name, candidate in contents[0]["candidates"].items():
        for task, cell in candidate["tasks"].items():
            assert contents[1]["candidates"][name]["tasks"][task]["value"] == pytest.approx(cell["value"], rel=1e-4)
