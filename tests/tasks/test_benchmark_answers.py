"""Benchmark and search on a LLaVA: every candidate writes its own answers, through its own projector."""

import copy
import json

import pytest
import torch
from lightning import Trainer
from torchmetrics import Metric

from datamodules.joint import JointDataModule
from datamodules.twins.models import write_llava
from datamodules.twins.vlm import write_vlm
from datamodules.vlm import VLMDataModule
from nscmerge import Adapter, LowRank, Pretrained, load_adapter, save_adapter
from nscmerge.base_model import load_base_model
from nscmerge.candidates import ClosedForm
from nscmerge.search import Grid, ScaleSearch
from nscmerge.update import Update
from nscmerge.whole import on_model
from tasks.benchmark import Benchmark
from tasks.generation import Generation
from tasks.score_tables import empty_lines
from tasks.scores import Scores, TaskInfo
from tasks.search import Loss, Score

TASKS = ("chartqa", "docvqa")
LAYERS = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
PROJECTOR = ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
NORM = "model.language_model.norm.weight"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class TextSum(Metric):
    """Mean over answers of a checksum in [1, 2) of text and accepted answers: equal only if every text is."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, predictions, targets):
        for text, accepted in zip(predictions, targets, strict=True):
            self.total += checksum(text, accepted)
            self.count += 1

    def compute(self):
        return self.total / self.count


def checksum(text, accepted):
    return 1 + sum((i + 1) * ord(c) for i, c in enumerate(text + "|".join(accepted))) % 9973 / 9973


class Echo(Generation):
    """Generation with a metric that tells texts apart."""

    primary, higher_is_better = "checksum", True

    def score(self):
        return {"checksum": TextSum()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return write_llava(root / "base", hidden=16, layers=2), write_vlm(root / "data", rows=10)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pretrained(places):
    return Pretrained(str(places[0]), "AutoModelForImageTextToText")


def data(places):
    tasks = {task: VLMDataModule(task, str(places[0]), str(places[1][task])) for task in TASKS}
    return JointDataModule(tasks, batch_size=1, val_samples=2, test_batch_size=3, test_samples=5)


def heads(places):
    return {task: Echo(str(places[0]), max_new_tokens=4) for task in TASKS}


def write_experts(places, tmp_path):
    """Two experts with LoRA and a projector; the second one also has a norm, and a bias of its own."""
    own = load_base_model(pretrained(places)).state_dict()
    folders = {}
    for k, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(k)
        layers = {
            name: LowRank(
                torch.randn(2, own[f"{name}.weight"].shape[1], generator=generator),
                torch.randn(own[f"{name}.weight"].shape[0], 2, generator=generator),
                0.5,
            )
            for name in LAYERS
        }
        saved = {}
        for name in PROJECTOR:
            weight = own[f"{name}.weight"]
            saved[f"{name}.weight"] = weight + 0.5 * torch.randn(weight.shape, generator=generator)
            saved[f"{name}.bias"] = own[f"{name}.bias"] + k
        modules = list(PROJECTOR)
        if k:
            saved[NORM] = own[NORM] + torch.rand(own[NORM].shape, generator=generator)
            modules.append(NORM.rpartition(".")[0])
        adapter = Adapter(layers, "someone/llava", saved=saved, modules_to_save=modules, name=task)
        folders[task] = save_adapter(adapter, tmp_path / task)
    return folders


def by_hand(places, task, weights):
    """Mean checksum of a plain model with some experts' updates added to its own weights, sample by sample.

    Args:
        weights: ``{expert folder: lambda}``.
    """
    model = load_base_model(pretrained(places))
    own = copy.deepcopy(model.state_dict())
    for folder, lam in weights.items():
        adapter = load_adapter(folder)
        for name, factors in adapter.layers.items():
            model.get_submodule(name).weight += lam * factors.dense()
        for name, tensor in adapter.saved.items():
            model.get_parameter(name).data += lam * (tensor - own[name])
    joint = data(places)
    joint.setup("test")
    answers = heads(places)[task].evaluator()
    (loader,) = (own for key, own in joint.labelled_dataloaders("test", 5, 1).items() if key == task)
    found = []
    for batch in loader:
        inputs = {k: v for k, v in batch.items() if k != "target"}
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = answers.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(checksum(text, batch["target"][0]))
    return sum(found) / len(found)


def test_every_candidate_writes_its_own_answers_with_its_own_projector(places, tmp_path):
    folders = write_experts(places, tmp_path)
    base = load_base_model(pretrained(places))
    experts = on_model(base, {task: load_adapter(folder) for task, folder in folders.items()})
    dense = {
        name: sum(0.3 * e.dense[name] for e in experts.values() if name in e.dense) for name in experts["docvqa"].dense
    }
    low = {name: LowRank(e.A, 0.3 * e.scaling * e.B) for name, e in experts["chartqa"].layers.items()}
    Update(low, dense, "someone/llava").save(tmp_path / "written")
    merges = {"ta": ClosedForm("task_arithmetic", lam=0.5), "written": tmp_path / "written"}
    benchmark = Benchmark(pretrained(places), heads(places), folders, merges, output=tmp_path / "scores")
    Trainer(**QUIET, default_root_dir=tmp_path).test(benchmark, data(places), verbose=False)
    got = {row.name: {task: row.values[task]["checksum"] for task in TASKS} for row in benchmark.scores.rows}
    for task in TASKS:
        others = {folder: 0.5 for folder in folders.values()}
        assert got["base"][task] == pytest.approx(by_hand(places, task, {}), abs=1e-9)
        assert got["expert"][task] == pytest.approx(by_hand(places, task, {folders[task]: 1.0}), abs=1e-9)
        assert got["ta"][task] == pytest.approx(by_hand(places, task, others), abs=1e-9)
        assert len({round(values[task], 9) for values in got.values()}) > 2  # answers do differ
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert record["base_form"]["model_class"] == "AutoModelForImageTextToText"
    assert record["notes"]["chartqa"] == ["answers are greedy, at most 4 new tokens, nothing stripped"]
    page = (tmp_path / "scores" / "scores.md").read_text()
    assert "- chartqa, docvqa: answers are greedy, at most 4 new tokens, nothing stripped." in page
    assert "empty_answers" in record["candidates"]["ta"]["tasks"]["chartqa"]["metrics"]


def test_empty_answers_are_said():
    values = {
        name: {"a": {"m": 0.5, "empty_answers": float(n)}, "b": {"m": 1.0}}
        for name, n in {"expert": 0, "ta": 3}.items()
    }
    scores = Scores.of({"a": TaskInfo("m", True, 10), "b": TaskInfo("m", True, 10)}, values)
    assert empty_lines(scores) == ["ta gave empty answers: 3 of 10 in a"]
    assert "- ta gave empty answers: 3 of 10 in a." in scores.as_markdown()


def test_a_search_takes_losses_of_answers_and_scores_of_texts(places, tmp_path):
    folders = write_experts(places, tmp_path)
    criteria = {"loss": Loss(heads(places), samples=2, batch_size=2)}
    search = ScaleSearch(
        pretrained(places),
        {task: str(folder) for task, folder in folders.items()},
        {"task_arithmetic": ClosedForm("task_arithmetic")},
        criteria,
        Grid(0.4, 0.6, 0.2, 0.1),
        judge=Score(heads(places), samples=5, batch_size=3),
        judge_at=[0.5],
    )
    result = search.run(Trainer(**QUIET, default_root_dir=tmp_path), data(places))
    (method,) = result.methods
    curve = method.curves["loss"]
    assert curve.chosen in curve.points
    both = {folder: 0.5 for folder in folders.values()}
    judged = method.judged.points[0.5].tasks
    for task in TASKS:
        assert judged[task] == pytest.approx(by_hand(places, task, both), abs=1e-9)
    # The loss is that of the answers, token by token, by a plain model.
    model = load_base_model(pretrained(places))
    joint = data(places)
    joint.setup("validate")
    loaders = joint.labelled_dataloaders("val", 2, 2, supervised=True)
    task = heads(places)["chartqa"]
    (batch,) = loaders["chartqa"]
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "target"}).logits
    want = float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["target"][:, 1:].flatten()))
    assert float(task.loss(logits, batch["target"])) == pytest.approx(want)
    assert curve.base.tasks["chartqa"] == pytest.approx(want, rel=1e-5)
