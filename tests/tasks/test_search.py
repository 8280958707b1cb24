"""Scale search with labels and without, through the Trainer and through the command, on tiny real models."""

import json
import math

import pytest
import torch
import yaml
from lightning import Trainer

from datamodules.joint import JointDataModule
from nscmerge import load_adapter, merge
from nscmerge.adapters import Adapter, save_adapter
from nscmerge.candidates import ClosedForm
from nscmerge.cli import main
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.factors import LowRank
from nscmerge.search import Grid, NullSpaceRatio, ScaleSearch
from nscmerge.update import load_update
from tasks.benchmark import Benchmark
from tasks.classification import TextClassification
from tasks.regression import TextRegression
from tasks.search import Loss, Score
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert

LAYERS = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.output.dense"]
GRID = Grid(0.2, 0.8, 0.2, 0.1)
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def heads():
    torch.manual_seed(1)
    return {"topic": TextClassification(2, WIDTH), "rating": TextRegression(WIDTH)}


def experts():
    found = {}
    for seed, (name, task) in enumerate(heads().items()):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            layer: LowRank(
                torch.randn(2, WIDTH, generator=generator), 0.3 * torch.randn(WIDTH, 2, generator=generator), 0.5
            )
            for layer in LAYERS
        }
        found[name] = Adapter(layers, "someone/tiny", head=task.state_dict(), name=name)
    return found


def data():
    tasks = {"topic": FakeTextDataModule(classes=True, seed=1), "rating": FakeTextDataModule(seed=2, size=17)}
    return JointDataModule(tasks, batch_size=4, val_samples=6, test_batch_size=7)


def search(output=None, methods=("task_arithmetic", "emr"), **options):
    criteria = {"loss": Loss(heads(), samples=10, batch_size=4), "omega": NullSpaceRatio(1)}
    defaults = {"criteria": criteria, "grid": GRID, "judge": Score(heads())}
    specs = {name: ClosedForm(name) for name in methods}
    return ScaleSearch(tiny_bert(), experts(), specs, output=output, **(defaults | options))


def loss_by_hand(name, delta):
    """Mean loss of one task, sample by sample, with the update added to the weights."""
    model, task = tiny_bert(), heads()[name]
    for layer in LAYERS:
        model.get_submodule(layer).weight += delta(layer)
    samples = data().tasks[name].dataset("val")
    rows = [samples[i * len(samples) // 10] for i in range(10)]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            prediction = task(model, {k: v[None] for k, v in row.items() if k != "target"})
            total += float(task.loss(prediction, row["target"][None]))
    return total / len(rows)


@pytest.fixture(scope="module")
def result():
    return search().run(Trainer(**QUIET), data())


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_losses_equal_those_computed_by_hand(result, method):
    own = {name: loss_by_hand(name, lambda layer, e=e: e.layers[layer].dense()) for name, e in experts().items()}
    unit = merge(experts(), method)
    curve = next(entry for entry in result.methods if entry.name == method).curves["loss"]
    assert set(GRID.coarse()) < set(curve.points)
    totals = {}
    for lam, point in curve.points.items():
        for name in own:
            task = name if method == "emr" else None
            expected = loss_by_hand(name, lambda layer, lam=lam, task=task: lam * unit.delta(layer, task))
            assert point.tasks[name] == pytest.approx(expected, rel=1e-4)
        totals[lam] = sum(point.tasks[name] / own[name] for name in own) / 2
        assert point.total == pytest.approx(totals[lam], rel=1e-4)
    assert curve.expert.tasks == pytest.approx(own, rel=1e-4)
    assert curve.base.tasks == pytest.approx({n: loss_by_hand(n, lambda layer: 0) for n in own}, rel=1e-4)
    assert curve.chosen == min(totals, key=totals.get)
    coarse = min(GRID.coarse(), key=totals.get)
    assert set(curve.points) == {*GRID.coarse(), *GRID.around(coarse)}


def test_the_judge_is_the_benchmark(result, tmp_path):
    folders = {name: save_adapter(adapter, tmp_path / name) for name, adapter in experts().items()}
    entry = result.methods[0]
    chosen = entry.choices()["loss"]
    merges = {"m": ClosedForm("task_arithmetic", lam=chosen)}
    benchmark = Benchmark(tiny_bert(), heads(), folders, merges)
    Trainer(**QUIET).test(benchmark, datamodule=data(), verbose=False)
    row = next(row for row in benchmark.scores.rows if row.name == "m")
    point = entry.judged.points[chosen]
    assert point.total == pytest.approx(row.mean, rel=1e-4)
    assert entry.judged.worst(chosen) == pytest.approx(row.worst[1], rel=1e-4)
    assert {1.0, entry.choices()["equal size"], *GRID.coarse(), *(c.chosen for c in entry.curves.values())} == set(
        entry.judged.points
    )


def test_the_merge_is_the_method_at_the_chosen_scale(result):
    for name in ("task_arithmetic", "emr"):
        update = result.merge(name, "omega")
        chosen = next(e for e in result.methods if e.name == name).curves["omega"].chosen
        task = "topic" if name == "emr" else None
        expected = merge(experts(), name, lam=chosen)
        for layer in LAYERS:
            torch.testing.assert_close(update.delta(layer, task), expected.delta(layer, task))
        assert update.recipe.options["lam"] == chosen
        assert update.recipe.extra["search"]["chosen"] == chosen
        assert {c["lam"] for c in update.recipe.extra["search"]["candidates"]} > set(GRID.coarse())


class _StopError(Exception): ...


@pytest.mark.parametrize("after", [1, 9, 31])
def test_interrupted_and_resumed_it_finds_the_same(result, tmp_path, after):
    output = tmp_path / "out"
    first = search(output)
    add, count = first._journal.add, 0

    def dying(*args):
        nonlocal count
        if count == after:
            raise _StopError
        count += 1
        add(*args)

    first._journal.add = dying
    with pytest.raises(_StopError):
        first.run(Trainer(**QUIET), data())
    working = tmp_path / "out.partial.jsonl"
    assert len(working.read_text().splitlines()) == after
    assert not output.exists()

    second = search(output)
    add, added = second._journal.add, []
    second._journal.add = lambda *args: (added.append(args), add(*args))
    again = second.run(Trainer(**QUIET), data())
    assert len(added) == len({*search_candidates(result)}) - after
    for one, other in zip(again.methods, result.methods, strict=True):
        assert one.choices() == other.choices()
        assert {n: c.as_json() for n, c in one.curves.items()} == {n: c.as_json() for n, c in other.curves.items()}
        assert one.judged.as_json() == other.judged.as_json()
    assert not working.exists()
    files = ["judge.png", "merges", "search.csv", "search.json", "search.md", "search.png"]
    assert sorted(path.name for path in output.iterdir()) == files


def search_candidates(result):
    for reference in ("base", "expert"):
        yield from ((reference, name) for name in ("loss", "omega", "judge"))
    for entry in result.methods:
        for curve in (*entry.curves.values(), entry.judged):
            yield from ((entry.name, curve.name, lam) for lam in curve.points)


def test_other_settings_are_not_taken_for_finished(tmp_path):
    first = search(tmp_path / "out", methods=["task_arithmetic"], judge=None, grid=Grid(0.2, 0.4, 0.2, None))
    first.run(Trainer(**QUIET), data())
    # The working file of a finished search is gone; another one with a wider grid and one more method starts anew.
    assert not (tmp_path / "out.partial.jsonl").exists()
    lines = []
    for samples in (10, 9):  # another sample count is another loss, but the same ratio
        criteria = {"loss": Loss(heads(), samples=samples, batch_size=4), "omega": NullSpaceRatio(1)}
        second = search(tmp_path / "other", ["task_arithmetic"], judge=None, grid=Grid(0.2, 0.2), criteria=criteria)
        second._journal.remove = lambda: None
        second.output = None
        second.run(Trainer(**QUIET), data())
        text = (tmp_path / "other.partial.jsonl").read_text()
        lines.append([json.loads(line)["criterion"] for line in text.splitlines()])
    assert set(lines[1][len(lines[0]) :]) == {"loss"}


def test_losses_that_are_not_finite_are_counted_and_never_chosen(monkeypatch):
    plain = TextRegression.loss
    monkeypatch.setattr(
        TextRegression, "loss", lambda self, p, t: plain(self, p, t) if state["lam"] != 0.4 else torch.tensor(math.nan)
    )
    state = {"lam": 0.0}
    one = search(methods=["task_arithmetic"], judge=None, grid=Grid(0.4, 0.8, 0.2, None))
    attach = one._attach
    one._attach = lambda c: (state.update(lam=c.lam), attach(c))[1]
    found = one.run(Trainer(**QUIET), data())
    curve = found.methods[0].curves["loss"]
    assert curve.non_finite == 1
    assert curve.chosen in (0.6, 0.8)
    assert "loss: 1 of 3 values are not finite" in " ".join(found.methods[0].signs)
    assert json.loads(found.as_json())["methods"]["task_arithmetic"]["curves"]["loss"]["candidates"][0]["total"] is None


def test_no_finite_loss_at_all_is_one_error(monkeypatch, tmp_path):
    plain = TextRegression.loss
    monkeypatch.setattr(
        TextRegression, "loss", lambda self, p, t: torch.tensor(math.nan) if state["merge"] else plain(self, p, t)
    )
    state = {"merge": False}
    one = search(tmp_path / "out", ["task_arithmetic"], judge=None)
    attach = one._attach
    one._attach = lambda c: (state.update(merge=c.method not in ("base", "expert")), attach(c))[1]
    with pytest.raises(ConfigError, match=r"no feasible scale: all values between 0.2 and 0.8 .*'task_arithmetic' by"):
        one.run(Trainer(**QUIET), data())
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial.jsonl").exists()


def test_an_expert_without_head_or_loss_is_named(monkeypatch):
    bare = {name: Adapter(e.layers, e.base_model, name=name) for name, e in experts().items()}
    one = ScaleSearch(tiny_bert(), bare, {"ties": ClosedForm("ties")}, {"loss": Loss(heads())}, GRID)
    with pytest.raises(AdapterError, match=r"expert 'topic' .* has no head.safetensors.* label-free criterion"):
        one.run(Trainer(**QUIET), data())
    with pytest.raises(ConfigError, match=r"only in the criterion: \['rating'\], only experts: \[\]"):
        Loss(heads()).prepare(tiny_bert(), {"topic": experts()["topic"]})
    with pytest.raises(ConfigError, match=r"expert 'a' has the loss 0.0"):
        Loss(heads()).relative({"a": 1.0}, {"a": 0.0})
    with pytest.raises(ConfigError, match="samples is 0"):
        Loss(heads(), samples=0)


def test_the_command_from_yaml_to_merge_folders(tmp_path, capsys):
    tiny_bert().save_pretrained(tmp_path / "base")
    for name, adapter in experts().items():
        save_adapter(adapter, tmp_path / name)
    tasks = {
        "topic": {"class_path": "tasks.classification.TextClassification",
                  "init_args": {"num_classes": 2, "hidden_size": WIDTH}},
        "rating": {"class_path": "tasks.regression.TextRegression", "init_args": {"hidden_size": WIDTH}},
    }  # fmt: skip
    fake = "tests.fakes.text_tasks.FakeTextDataModule"
    config = {
        "trainer": {**QUIET, "devices": 1},
        "model": {
            "class_path": "nscmerge.search.ScaleSearch",
            "init_args": {
                "base_model": str(tmp_path / "base"),
                "experts": {name: str(tmp_path / name) for name in tasks},
                "methods": {
                    "ta": {"method": "task_arithmetic"},
                    "t50": {"method": "ties", "options": {"density": 0.5}},
                },
                "grid": {"start": 0.2, "stop": 0.4, "step": 0.2, "fine": None},
                "criteria": {
                    "loss": {"class_path": "tasks.search.Loss", "init_args": {"tasks": tasks, "samples": 6}},
                    "omega": {"class_path": "nscmerge.search.NullSpaceRatio", "init_args": {
                        "blocks": 1, "also": {"query": {"blocks": [0], "projections": ["query"]}}}},
                },
                "merges_for": ["omega"],
                "output": str(tmp_path / "out"),
            },
        },
        "data": {
            "class_path": "datamodules.joint.JointDataModule",
            "init_args": {
                "tasks": {"topic": {"class_path": fake, "init_args": {"classes": True}}, "rating": {"class_path": fake}}
            },
        },
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    main(["search", "--config", str(tmp_path / "search.yaml")])
    out = capsys.readouterr().out
    assert "omega.query" in out
    assert f"search written to {tmp_path / 'out'}" in out
    content = json.loads((tmp_path / "out" / "search.json").read_text())
    assert content["inputs"]["topic"]["sha256"] == load_adapter(tmp_path / "topic").sha256
    assert content["methods"]["t50"]["options"] == {"density": 0.5}
    assert content["config"]["model"]["init_args"]["grid"]["stop"] == 0.4
    assert sorted(p.name for p in (tmp_path / "out" / "merges").iterdir()) == ["t50.omega", "ta.omega"]
    update = load_update(tmp_path / "out" / "merges" / "ta.omega")
    assert update.recipe.options["lam"] == content["methods"]["ta"]["choices"]["omega"]
    rows = (tmp_path / "out" / "search.csv").read_text().splitlines()
    # 2 methods x 3 curves x 2 scales x (2 tasks and their mean), and the header
    assert len(rows) == 2 * 3 * 2 * 3 + 1
    with pytest.raises(SystemExit):
        main(["search", "--config", str(tmp_path / "search.yaml")])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        empty = ["--model.init_args.grid.start", "0.5", "--model.init_args.output", str(tmp_path / "no")]
        main(["search", "--config", str(tmp_path / "search.yaml"), *empty])
    assert "has no point" in capsys.readouterr().err
