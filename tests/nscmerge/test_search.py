"""Scales, working file, label-free criterion: what a scale search is made of, each against arithmetic by hand."""

import json
import math

import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank
from nscmerge.candidates import ClosedForm
from nscmerge.errors import ConfigError, TargetError
from nscmerge.merging import merge
from nscmerge.search import Grid, NullSpaceRatio, Reading, ScaleSearch
from nscmerge.search.curve import Curve, MethodResult, Point, equal_size
from nscmerge.search.grid import best_scale
from nscmerge.search.journal import Journal
from nscmerge.search.ratio import capture
from nscmerge.search.signs import signs
from nscmerge.search.size import growth
from nscmerge.switch import attach_switch
from tests.fakes.fit_merge import adapters
from tests.fakes.text_tasks import FakeTextDataModule, tiny_bert
from tests.oracles import dense_ratio

QUERY = "encoder.layer.1.attention.self.query"
OUTPUT = "encoder.layer.1.attention.output.dense"


class TestGrid:
    def test_scales_are_the_decimals_that_one_would_write(self):
        # 0.1 + 2 * 0.1 is 0.30000000000000004 in floats, and adding up twenty steps misses 2.0.
        assert Grid().coarse() == [float(f"{i / 10:.1f}") for i in range(1, 21)]
        assert Grid().around(0.3) == [float(f"{i / 100:.2f}") for i in range(21, 40) if i != 30]

    def test_the_spec_of_both_stages(self):
        grid = Grid()
        assert (len(grid.coarse()), grid.coarse()[0], grid.coarse()[-1]) == (20, 0.1, 2.0)
        assert (grid.around(2.0)[0], grid.around(2.0)[-1], len(grid.around(2.0))) == (1.91, 2.09, 18)
        assert grid.around(0.1) == [float(f"{i / 100:.2f}") for i in range(1, 20) if i != 10]

    def test_stop_is_met_only_by_a_whole_step(self):
        assert Grid(0.2, 1.0, 0.3, None).coarse() == [0.2, 0.5, 0.8]
        assert Grid(0.5, 0.5, 0.1).coarse() == [0.5]

    def test_a_fine_step_that_does_not_divide_the_coarse_one_stays_inside_it(self):
        assert Grid(0.1, 1, 0.1, 0.03).around(0.5) == [0.41, 0.44, 0.47, 0.53, 0.56, 0.59]

    def test_no_fine_stage(self):
        assert Grid(fine=None).around(0.5) == []

    def test_negative_grids_cross_zero(self):
        assert Grid(-0.1, 0.1, 0.1, 0.05).coarse() == [-0.1, 0.0, 0.1]
        assert Grid(-0.1, 0.1, 0.1, 0.05).around(0.0) == [-0.05, 0.05]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": 1.0, "stop": 0.5}, r"from 1.0 to 0.5 in steps of 0.1 has no point; .*start <= stop"),
            ({"step": 0.0}, "in steps of 0.0 has no point"),
            ({"step": -0.1}, "in steps of -0.1 has no point"),
            ({"stop": math.inf}, "to inf in steps"),
            ({"start": math.nan}, "from nan to"),
            ({"fine": 0.1}, "fine step 0.1 is not between 0 and the coarse step 0.1"),
            ({"fine": 0.0}, "fine step 0.0 is not between"),
        ],
    )
    def test_infeasible(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Grid(**options)

    def test_best_ties_to_the_smaller_and_skips_what_is_not_finite(self):
        assert best_scale({0.3: 1.0, 0.2: 1.0, 0.1: 2.0}) == 0.2
        assert best_scale({0.3: 5.0, 0.2: 5.0, 0.1: 2.0}, higher_is_better=True) == 0.2
        assert best_scale({0.1: math.nan, 0.2: 3.0, 0.3: -math.inf}) == 0.2
        assert best_scale({0.1: math.nan, 0.2: math.inf}) is None


class TestJournal:
    def test_reads_back_what_was_written_bit_for_bit(self, tmp_path):
        value = 0.1 + 0.2
        Journal(tmp_path / "x.jsonl").add("k", 0.3, {"": {"a": value, "b": math.nan}}, "ties", "loss")
        found = Journal(tmp_path / "x.jsonl").get("k", 0.3)
        assert found[""]["a"] == value
        assert math.isnan(found[""]["b"])
        assert Journal(tmp_path / "x.jsonl").get("other", 0.3) is None

    def test_half_a_line_is_cut_off(self, tmp_path):
        path = tmp_path / "x.jsonl"
        journal = Journal(path)
        journal.add("k", 0.1, {"": {"a": 1.0}}, "m", "c")
        journal.add("k", 0.2, {"": {"a": 2.0}}, "m", "c")
        path.write_text(path.read_text()[:-9])
        again = Journal(path)
        assert again.get("k", 0.1) == {"": {"a": 1.0}}
        assert again.get("k", 0.2) is None
        again.add("k", 0.2, {"": {"a": 2.0}}, "m", "c")
        assert [json.loads(line)["lam"] for line in path.read_text().splitlines()] == [0.1, 0.2]

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("not json\n")
        with pytest.raises(ConfigError, match=r"x.jsonl, line 1, is no finished candidate.*Delete"):
            Journal(tmp_path / "x.jsonl")


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": torch.randint(1, 50, (2, 5), generator=generator) * mask, "attention_mask": mask}


def test_the_criterion_is_the_dense_ratio_of_each_tasks_own_adapter():
    model = tiny_bert()
    experts = adapters(model)
    criterion = NullSpaceRatio(1, None, also={"qo": Reading(1, ["query", "attention.output.dense"])})
    criterion.prepare(model, experts)
    merged = merge(experts, "task_arithmetic", lam=0.7)
    inputs = {task: [batch(k), batch(10 + k)] for k, task in enumerate(experts)}
    switch = attach_switch(model, {"m": merge(experts, "task_arithmetic").layers})
    switch.activate("m", 0.7)
    with torch.inference_mode():
        for task, both in inputs.items():
            for one in both:
                criterion.update(model, task, one)
    found = criterion.compute()

    plain, seen = tiny_bert(), {}
    for layer in merged.layers:
        plain.get_submodule(layer).weight += merged.delta(layer)
    for name in (QUERY, OUTPUT):
        plain.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    for task, both in inputs.items():
        by_layer = {QUERY: [], OUTPUT: []}
        for one in both:
            with torch.no_grad():
                plain(**one)
            for name, values in by_layer.items():
                omega = dense_ratio(seen[name], experts[task].layers[name].A)
                for row, valid in zip(omega, one["attention_mask"].bool(), strict=True):
                    values.append(float(row[valid].mean()))
        means = {name: sum(values) / len(values) for name, values in by_layer.items()}
        assert found[""][task] == pytest.approx(means[OUTPUT], abs=2e-6)
        assert found["qo"][task] == pytest.approx(sum(means.values()) / 2, abs=2e-6)
    matched = NullSpaceRatio(1, match=True)
    assert matched.total({"a": 0.5, "b": 0.9}, {"a": 0.7, "b": 0.8}) == pytest.approx(0.15)
    assert criterion.total(found[""], {}) == pytest.approx(sum(found[""].values()) / 3)
    criterion.reset()
    switch.detach()
    assert isinstance(model.get_submodule(QUERY), nn.Linear)


def test_layers_that_no_adapter_or_not_every_adapter_has():
    model = tiny_bert()
    experts = dict(adapters(model))
    with pytest.raises(TargetError, match="no target layer is left"):
        NullSpaceRatio(projections=["gate_proj"]).prepare(model, experts)
    experts["b"] = Adapter({QUERY: experts["b"].layers[QUERY]}, "tiny", name="b")
    with pytest.raises(TargetError, match=r"the adapter of 'b' has none of the layers .*output.dense"):
        NullSpaceRatio(1).prepare(model, experts)


def test_capture_says_what_never_ran_or_ran_twice():
    linear = nn.Linear(3, 3)
    twice = nn.Sequential(linear, linear, nn.Linear(3, 3))
    with pytest.raises(TargetError, match="layer 'x' runs more than once"):
        capture(twice, {"input": torch.ones(1, 3)}, {"x": "0", "y": "2"})
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(TargetError, match=r"never ran the layers \['b'\]"):
        capture(model, {"x": torch.ones(1, 3)}, {"a": "used", "b": "unused"})


def test_growth_is_the_ratio_of_dense_norms():
    experts = adapters(tiny_bert())
    merged = merge(experts, "ties")
    dense = torch.cat([merged.delta(layer).flatten() for layer in merged.layers]).norm()
    norms = [torch.cat([e.dense().flatten() for e in a.layers.values()]).norm() for a in experts.values()]
    assert growth(merged, experts) == pytest.approx(float(dense / (sum(norms) / 3)), rel=1e-5)
    per_task = merge(experts, "emr")
    found = [torch.cat([per_task.delta(layer, t).flatten() for layer in per_task.layers]).norm() for t in experts]
    assert growth(per_task, experts) == pytest.approx(float(sum(found) / sum(norms)), rel=1e-5)


def curve(values, expert=1.0, name="loss", higher=False):
    points = {lam: Point(value, {"a": value}, {"a": value}) for lam, value in values.items()}
    return Curve(name, higher, points, Point(expert, {}, {}), Point(2.0, {}, {}))


def test_choices_name_the_oracle_as_such():
    judged = curve({0.1: 80.0, 0.2: 95.0, 0.25: 99.0, 1.0: 60.0}, name="judge", higher=True)
    entry = MethodResult("ties", ClosedForm("ties"), 1.0, {"loss": curve({0.1: 2.0, 0.25: 1.0})}, judged, [0.1, 0.2])
    # Growth 1: as large as the experts at scale 1. The oracle is the best of the judge's own scales, not of all.
    assert entry.choices() == {"loss": 0.25, "equal size": 1.0, "scale 1": 1.0, "oracle": 0.2}
    assert equal_size(2.967) == 0.34
    assert equal_size(0.0) is equal_size(math.nan) is None
    assert curve({0.1: math.nan, 0.2: math.inf}).chosen is None
    assert curve({0.1: math.nan, 0.2: 3.0}).non_finite == 1


class TestSigns:
    grid = Grid(0.1, 0.9, 0.1, None)

    def found(self, one, growth=2.0):
        return signs({one.name: one}, self.grid, growth)

    def ratio(self, best):
        points = {lam: Point(abs(lam - best), {}, {}) for lam in self.grid.coarse()}
        return Curve("omega", False, points, Point(0.0, {}, {}), Point(1.0, {}, {}), label_free=True)

    def test_none_inside_the_grid_at_about_the_size_of_the_experts(self):
        assert self.found(self.ratio(0.5)) == self.found(self.ratio(0.3)) == self.found(self.ratio(0.6)) == []

    def test_ends_of_the_grid(self):
        start, stop = curve({0.1: 1.0, 0.5: 2.0}), curve({0.5: 3.0, 0.9: 2.0, 0.99: 1.0})
        assert self.found(start) == [
            "loss: the best scale 0.1 is at the start of the grid; the optimum may lie beyond."
        ]
        assert self.found(stop) == ["loss: the best scale 0.99 is at the stop of the grid; the optimum may lie beyond."]

    @pytest.mark.parametrize(("best", "size"), [(0.2, "0.40"), (0.8, "1.60")])
    def test_label_free_choices_of_another_size_than_the_experts(self, best, size):
        (sign,) = self.found(self.ratio(best))
        assert sign.startswith(
            f"omega: at the best scale {best} the merged update is {size} times as large as the mean"
        )
        # A loss needs no such sign: it sees for itself.
        assert self.found(curve({0.1: 3.0, best: 1.0, 0.9: 2.0})) == []

    def test_values_that_are_not_finite_are_counted(self):
        assert self.found(curve({0.2: math.nan, 0.3: 1.0, 0.4: math.inf})) == ["loss: 2 of 3 values are not finite."]


class TestScaleSearchRefuses:
    def search(self, **options):
        model = tiny_bert()
        defaults = {"methods": {"ta": ClosedForm("task_arithmetic")}, "criteria": {"omega": NullSpaceRatio(1)}}
        return ScaleSearch(model, adapters(model), **(defaults | options))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": {}}, "at least one method"),
            ({"criteria": {}}, "at least one method and one criterion"),
            ({"methods": {"base": ClosedForm("ties")}}, "named 'base', which the tables use"),
            ({"methods": {"ties": ClosedForm("ties", lam=0.4)}}, "method 'ties' has lam = 0.4; the search chooses"),
            ({"criteria": {"judge": NullSpaceRatio(1)}}, "criterion is named 'judge'"),
            ({"criteria": {"a.b": NullSpaceRatio(1)}}, "criterion is named 'a.b'"),
            ({"refine": ["loss"]}, r"refine names \['loss'\], which are no curves here; known: omega"),
            ({"refine": ["omega.qkvo"]}, r"refine names \['omega.qkvo'\]"),
            ({"merges_for": ["omega.qkvo"]}, r"merges_for names \['omega.qkvo'\]"),
        ],
    )
    def test_names(self, options, message):
        with pytest.raises(ConfigError, match=message):
            self.search(**options)

    def test_output_that_exists_before_any_adapter_is_read(self, tmp_path):
        with pytest.raises(FileExistsError, match="is there already"):
            ScaleSearch("nowhere", {"a": "not/there"}, {}, {}, output=tmp_path)

    def test_data_of_other_tasks_and_several_processes(self):
        from lightning import Trainer

        from datamodules.joint import JointDataModule

        data = JointDataModule({"a": FakeTextDataModule(), "x": FakeTextDataModule()})
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        with pytest.raises(ConfigError, match=r"'omega' finds data of the tasks \['a', 'x'\], the experts are"):
            self.search().run(Trainer(**quiet), data)
        with pytest.raises(ConfigError, match="one process, got 2"):
            self.search().run(Trainer(devices=2, strategy="ddp_spawn", **quiet), data)


def test_a_factor_of_zero_rank_or_zero_size_grows_nothing():
    zero = {"a": Adapter({"x": LowRank(torch.zeros(1, 2), torch.zeros(2, 1))}, name="a")}
    assert math.isnan(growth(merge(zero, "task_arithmetic"), zero))
