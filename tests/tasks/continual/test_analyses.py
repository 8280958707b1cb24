"""Affinity over layers, sweeps around a method, overhead: against numbers by hand and on a tiny model."""

import csv
import math

import numpy as np
import pytest
import torch

from nscmerge import Adapter, LowRank, save_adapter
from nscmerge.continual.affinity import affinity
from tasks.continual import affinity as analysis
from tasks.continual import overhead
from tasks.continual.figures import sweep_figure, sweeps
from tasks.continual.module import ContinualForm
from tasks.continual.moments import input_moments
from tasks.continual.record import Row, Run
from tasks.continual.report import write_report
from tasks.continual.results import Column, Results
from tests.fakes.continual_suite import LAYERS, TASKS, data, module, run, update, write_experts


@pytest.fixture
def folder(tmp_path):
    return write_experts(tmp_path)


def test_affinities_are_those_of_every_pair(folder, tmp_path):
    one = module(folder, activations=8, layer_groups={"query": ["*query"], "none": ["*nothing*"]})
    found = analysis.measure(one, data())
    moments = input_moments(one, data(), 8)
    assert found.groups == {"all": LAYERS, "query": LAYERS[:1]}
    for layer in LAYERS:
        for i, source in enumerate(TASKS):
            for j in range(len(TASKS)):
                wanted = affinity(update(j)[layer], moments[source][layer])
                assert found.values[layer][i, j] == pytest.approx(wanted, rel=1e-6)
    own = np.mean([found.values[LAYERS[0]][i, i] for i in range(3)])
    assert found.pairs("query", True)[0] == pytest.approx(own)
    assert found.expected("all") == pytest.approx(8 / 32)
    analysis.write(found, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "affinity.csv",
        "affinity.md",
        "affinity_heat.png",
        "affinity_ecdf.png",
    }
    lines = list(csv.DictReader((tmp_path / "out" / "affinity.csv").open()))
    assert len(lines) == 2 * 9
    assert {line["groups"] for line in lines} == {"all query", "all"}


def swept(name, acc, **options):
    options = {"filter_rank": 128, "steps": 50, "filter": True} | options
    return Run(name, "nufilt", "default", options, ["a"], [Row("a", {"a": acc}, 1.0, 1)])


def test_a_sweep_gathers_what_differs_in_one_number(tmp_path):
    runs = [
        swept("nufilt", 0.8),
        swept("few", 0.6, filter_rank=8),
        swept("none", 0.4, filter_rank=0),
        swept("both", 0.5, filter_rank=8, steps=5),
        swept("open", 0.5, filter=False),
        Run("other", "opcm", "default", {"filter_rank": 1, "steps": 50, "filter": True}, ["a"], swept("x", 1).rows),
    ]
    results = Results({"a": Column("accuracy", True)}, {"a": 0.2}, {"a": 1.0}, runs)
    assert sweeps(results, "nufilt") == {"filter_rank": [(0.0, "none"), (8.0, "few"), (128.0, "nufilt")]}
    assert sweeps(results, "nothing") == {}
    assert sweep_figure(results, "other") is None
    write_report(results, tmp_path)
    assert (tmp_path / "sweep.png").is_file()


def test_a_method_that_learns_is_given_inputs_without_labels(folder):
    form = ContinualForm("adamerging", options={"lr": 0.1, "steps": 3, "without_entropy": "start"}, samples=6)
    results = run(module(folder, {"ada": form, "ta": ContinualForm("task_arithmetic")}, orders=[["mood", *TASKS[:2]]]))
    ada, ta = results.of("ada")[0], results.of("ta")[0]
    assert ada.options | {"samples": 6, "batch_size": 8} == ada.options
    assert "samples" not in ta.options
    assert ada.rows[0].losses != ta.rows[0].losses  # learned on "mood"
    assert any("'rating' came in at the start value" in note for note in ada.notes)
    for batches in form_batches(folder).values():
        assert all("target" not in batch for batch in batches)


def form_batches(folder):
    form = ContinualForm("adamerging", samples=6, batch_size=4)
    batches = module(folder).made(form, data()).batches
    assert {task: sum(len(b["input_ids"]) for b in found) for task, found in batches.items()} == dict.fromkeys(TASKS, 6)
    return batches


def test_overhead_counts_every_step(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        layers = {"layer": LowRank(torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator))}
        save_adapter(Adapter(layers, "someone/tiny", name=name), tmp_path / name)

    class Module:
        methods = {"average": ContinualForm("weight_average"), "iso": ContinualForm("iso_c")}  # noqa: RUF012
        orders = (["a", "b"],)
        experts = {name: tmp_path / name for name in "ab"}  # noqa: RUF012
        checkpoint_class = None
        made = staticmethod(lambda form, data: form.make())

    class Cli:
        model, datamodule = Module, None

    monkeypatch.setattr(overhead, "parse", lambda args: Cli)
    rows = [overhead.measure([], name) for name in Module.methods]
    assert [row.parameters for row in rows] == [4 * (6 + 8), 4 * (6 + 8)]
    for row in rows:
        assert 0 < row.seconds_per_step <= row.seconds
        assert row.cpu_seconds_per_step >= 0
        assert 0 < row.start_mb <= row.peak_mb
        assert math.isfinite(row.peak_mb)
    overhead.write(rows, tmp_path / "out")
    assert (tmp_path / "out" / "overhead.md").read_text().count("\n") == 4
    assert len(list(csv.DictReader((tmp_path / "out" / "overhead.csv").open()))) == 2
