"""Twenty dense tasks on rendered scenes, from pixels to the table: four pools, fit, search, benchmark, record."""

import json

import lightning
import pytest
import torch
from lightning import Trainer

from nscmerge import MergeModule
from nscmerge.candidates import ClosedForm
from nscmerge.objectives import NSC
from nscmerge.search import Grid, ScaleSearch
from tasks.benchmark import Benchmark
from tasks.search import Loss
from tests.fakes.scenes20 import scene_data, scene_tasks, write_scene_experts

NOTE = "synthetic ray-cast scenes (project)"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a merged score of .* counts as 0 percent")]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_scene_experts(tmp_path_factory.mktemp("suite"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSCMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_parts_are_a_pool_of_their_own(suite):
    data = scene_data(share=True)
    data.prepare_data()
    data.setup("fit")
    assert [len(key) if isinstance(key, tuple) else 1 for key in data.batch_keys] == [4, 4, 1, 11]
    assert data.batch_keys[2] == "pascal_parts"
    loaders = data.labelled_dataloaders("test")
    sizes = {str(key): len(loader.dataset) for key, loader in loaders.items()}
    assert sizes["pascal_parts"] < sizes[str(data.batch_keys[1])] == 8  # scenes without people have no parts


@pytest.mark.parametrize("name", ["scores", "losses"])
def test_shared_batches_give_the_numbers_of_one_pass_per_task(suite, name, tmp_path):
    base, experts = suite
    found = []
    for share in (True, False):
        if name == "losses":
            found.append(losses(base, experts, share))
        else:
            found.append(scores(base, experts, share, tmp_path / str(share)))
    assert found[0].keys() == found[1].keys()
    for key, values in found[0].items():
        assert values == pytest.approx(found[1][key], rel=1e-3, abs=1e-6, nan_ok=True), key


def losses(base, experts, share):
    criterion = Loss(scene_tasks(), samples=2, batch_size=2)
    methods = {"task_arithmetic": ClosedForm("task_arithmetic")}
    search = ScaleSearch(base, experts, methods, {"loss": criterion}, Grid(0.1, 0.2, 0.1, None))
    result = search.run(Trainer(**QUIET), scene_data(share))
    assert result.origin["data"] == NOTE
    curve = result.methods[0].curves["loss"]
    return {"expert": curve.expert.tasks, "base": curve.base.tasks} | {str(k): p.tasks for k, p in curve.points.items()}


def scores(base, experts, share, output):
    merges = {"task_arithmetic": ClosedForm("task_arithmetic", 0.1)}
    groups = {task: task.partition("_")[0] for task in experts}
    benchmark = Benchmark(base, scene_tasks(), experts, merges, output=output, groups=groups)
    Trainer(**QUIET).test(benchmark, datamodule=scene_data(share), verbose=False)
    content = json.loads((output / "scores.json").read_text())
    assert content["data"] == NOTE
    assert set(content["candidates"]["task_arithmetic"]["groups"]) == {"nyud", "pascal", "tax"}
    assert content["data_module"]["tasks"]["tax_de"]["data"] == NOTE
    assert content["heads"]["nyud_edge"]["init_args"]["max_dist"] == 0.011
    assert len(content["base_sha256"]) == 64
    for text in ("scores.csv", "scores.md", "summary.csv"):
        assert NOTE in (output / text).read_text()
    assert (output / "scores.png").stat().st_size > 10_000
    return {
        row.name: {f"{t}.{m}": v for t, own in row.values.items() for m, v in own.items()}
        for row in benchmark.scores.rows
    }


def test_a_fit_on_four_pools_equals_one_pass_per_task_on_the_same_draws(suite):
    base, experts = suite
    data = scene_data(share=True)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    apart = {task: inputs for key, inputs in batch.items() for task in ((key,) if isinstance(key, str) else key)}
    results = []
    for one in (batch, {task: apart[task] for task in data.task_names}):
        merge = MergeModule(base, experts, objective=NSC(projections=["attn.proj"]))
        merge.configure_model()
        found = merge._losses(one)
        merge.objective.total([found[task] for task in experts]).backward()
        gradient = [torch.zeros(20) if lam.grad is None else lam.grad for lam in merge.coefficients.lam]
        results.append((torch.stack([found[task] for task in experts]).detach(), torch.stack(gradient)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    assert (results[0][1] - results[1][1]).abs().max() <= 1e-6


def test_a_fit_writes_what_the_data_were(suite, tmp_path):
    base, experts = suite
    lightning.seed_everything(0, verbose=False)
    merge = MergeModule(base, experts, objective=NSC(projections=["attn.proj"]), output=tmp_path / "merge")
    Trainer(max_steps=2, enable_checkpointing=False, limit_val_batches=1, **QUIET).fit(merge, scene_data(share=True))
    receipt = json.loads((tmp_path / "merge" / "receipt.json").read_text())
    assert receipt["options"]["data"]["note"] == NOTE
    assert receipt["options"]["data"]["share_batches"] is True
