"""start, append, update, run: names, refusals, and what a state says of itself."""

import json
from dataclasses import replace

import pytest
import torch

from nscmerge import Adapter, LowRank, continual, save_adapter
from nscmerge.continual.checks import Step
from nscmerge.continual.state import State
from nscmerge.errors import AdapterError, MethodError, ShapeError
from nscmerge.peft_format import Kind


def layer(seed=0, d_out=6, d_in=5, rank=2):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), 2.0)


def adapter(seed, **more):
    return Adapter({"fc1": layer(seed), "fc2": layer(seed + 10)}, name=f"t{seed}", **more)


@pytest.fixture
def averaged():
    """A method, and its state after one expert of a named base."""
    method = continual.make("weight_average")
    return method, method.start(adapter(0, base_model="org/base", sha256="ab" * 32, source="folder/t0"))


class TestNames:
    def test_misspelt_ones_are_named(self):
        with pytest.raises(MethodError, match=r"no continual method 'nufil'; did you mean 'nufilt'\? Known: .*wudi"):
            continual.run([adapter(0)], "nufil")
        with pytest.raises(MethodError, match=r"'ties': no variant 'papercod'; did you mean 'papercode'"):
            continual.run([adapter(0)], "ties", "papercod")
        with pytest.raises(MethodError, match=r"'opcm': no option 'alfa'; did you mean 'alpha'"):
            continual.run([adapter(0)], "opcm", alfa=0.5)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("task_arithmetic", {"lam": float("nan")}),
            ("magmax", {"lam": True}),
            ("ties", {"density": 0.0}),
            ("ties", {"agg": "max"}),
            ("knots_ties", {"density": 1.5}),
            ("opcm", {"alpha": -0.1}),
            ("wudi", {"lr": -1.0}),
            ("wudi", {"rank": 0}),
        ],
    )
    def test_options_out_of_range(self, method, options):
        with pytest.raises(MethodError, match=f"{method}.*{next(iter(options))} is"):
            continual.make(method, **options)

    @pytest.mark.parametrize("method", continual.METHODS)
    def test_a_state_says_how_to_go_on(self, method):
        made = continual.make(method)
        assert json.loads(json.dumps(made.options)) == made.options
        assert continual.make(method, made.variant, **made.options) == made


class TestRun:
    def test_reads_folders_in_turn_and_says_so(self, tmp_path):
        folders = [save_adapter(adapter(k), tmp_path / f"task{k}") for k in range(3)]
        updates = continual.run(folders, "task_arithmetic", lam=0.5)
        assert len(updates) == 3
        want = 0.5 * sum(adapter(k).layers["fc1"].dense() for k in range(3))
        torch.testing.assert_close(updates[-1].delta("fc1"), want)
        inputs = updates[-1].recipe.inputs
        assert [one.name for one in inputs] == ["task0", "task1", "task2"]
        assert all(one.sha256 and one.source == str(folder) for one, folder in zip(inputs, folders, strict=True))
        with pytest.raises(AdapterError, match=r"same weights.*'task0'.*already in"):
            continual.run({"a": adapter(5), "task0": folders[0], "again": folders[0]}, "task_arithmetic")

    def test_later_folders_are_read_when_their_turn_comes(self, tmp_path):
        good = save_adapter(adapter(0), tmp_path / "good")
        states = continual.steps([good, tmp_path / "missing"], "weight_average")
        assert next(states).t == 1
        with pytest.raises(AdapterError, match="missing"):
            next(states)

    def test_names_of_adapters_in_memory(self):
        unnamed = [replace(adapter(k), name="adapter") for k in range(2)]
        assert [one.name for one in continual.run(unnamed, "ties")[-1].recipe.inputs] == ["adapter_0", "adapter_1"]
        named = continual.run({"x": adapter(0), "y": adapter(1)}, "ties")[-1]
        assert [one.name for one in named.recipe.inputs] == ["x", "y"]

    @pytest.mark.parametrize(("experts", "match"), [([], "no expert"), (adapter(0), "one Adapter"), ([3], "is a int")])
    def test_what_is_no_list_of_experts(self, experts, match):
        with pytest.raises(AdapterError, match=match):
            continual.run(experts, "weight_average")

    def test_every_name_of_every_expert_answers_at_every_later_step(self):
        second = Adapter({"fc1": layer(3), "fc3": layer(4)}, dense={"norm.bias": torch.ones(3)}, name="t1")
        for method in ("weight_average", "nufilt", "knots_ties", "wudi"):
            update = continual.run([adapter(0), second], method)[-1]
            for name, shape in (("fc1", (6, 5)), ("fc2", (6, 5)), ("fc3", (6, 5)), ("norm.bias", (3,))):
                assert update.delta(name).shape == shape
                assert update.delta(name).dtype == torch.float32


class TestRefused:
    """Every refusal leaves the state as it was; it is never written to."""

    def test_another_base(self, averaged):
        method, state = averaged
        with pytest.raises(AdapterError, match=r"'t1' is an adapter of 'org/other', this merge is of 'org/base'"):
            method.append(state, adapter(1, base_model="org/other"))

    def test_a_repeated_task(self, averaged):
        method, state = averaged
        with pytest.raises(AdapterError, match=r"task 't0' is already in this merge \(number 1 of 1, folder/t0\)"):
            method.append(state, replace(adapter(1), name="t0"))
        with pytest.raises(AdapterError, match=r"'other'.*same weights.*'t0'"):
            method.append(state, replace(adapter(1, sha256="ab" * 32), name="other"))

    def test_another_shape(self, averaged):
        method, state = averaged
        with pytest.raises(ShapeError, match=r"'fc1' is \(6, 7\) in 'wide', \(6, 5\) in the merge so far \('t0'\)"):
            method.append(state, Adapter({"fc1": layer(1, d_in=7)}, name="wide"))

    def test_no_name_in_common(self, averaged):
        method, state = averaged
        with pytest.raises(AdapterError, match=r"shares no name.*'model.fc1' here, 'fc1' there"):
            method.append(state, Adapter({"model.fc1": layer(1)}, name="renamed"))

    def test_factors_here_and_a_tensor_there(self, averaged):
        method, state = averaged
        mixed = Adapter({"fc2": layer(1)}, dense={"fc1.weight": torch.ones(6, 5)}, name="mixed")
        with pytest.raises(AdapterError, match=r"layer 'fc1' has factors in one expert and a dense tensor"):
            method.append(state, mixed)
        start = method.start(Adapter(dense={"fc1.weight": torch.ones(6, 5), "fc2.bias": torch.ones(2)}, name="full"))
        with pytest.raises(AdapterError, match=r"layer 'fc1' has factors"):
            method.append(start, replace(adapter(1), dense={"fc2.bias": torch.ones(2)}))

    def test_another_kind_of_layer(self, averaged):
        method, state = averaged
        with pytest.raises(AdapterError, match=r"'fc1' is embedding in 't1', linear in the merge so far"):
            method.append(state, adapter(1, kinds={"fc1": Kind("embedding")}))

    def test_what_is_not_finite_or_empty(self, averaged):
        method, state = averaged
        broken = Adapter({"fc1": LowRank(torch.full((2, 5), torch.nan), torch.ones(6, 2))}, name="broken")
        with pytest.raises(AdapterError, match=r"'broken', layer 'fc1': A holds 10 NaN"):
            method.append(state, broken)
        with pytest.raises(AdapterError, match="nothing to merge"):
            method.append(state, Adapter(name="empty"))

    def test_another_method_or_other_settings(self, averaged):
        _, state = averaged
        with pytest.raises(MethodError, match=r"made by weight_average \(default\), this is opcm"):
            continual.make("opcm").append(state, adapter(1))
        state = continual.make("opcm").start(adapter(0))
        with pytest.raises(MethodError, match=r"alpha=0.5\), this is opcm \(default, alpha=0.7\)"):
            continual.make("opcm", alpha=0.7).append(state, adapter(1))


def test_heads_and_whole_tensors_are_left_out_and_named():
    saved = adapter(1, head={"score.weight": torch.ones(2, 2)}, saved={"embed.weight": torch.ones(3, 3)})
    with pytest.warns(UserWarning, match=r"'t1': 1 tensors not merged.*on_base"):
        update = continual.run([adapter(0), saved], "weight_average")[-1]
    assert set(update.recipe.skipped) == {"score.weight", "embed.weight"}
    with pytest.raises(AdapterError, match=r"'score.weight' was skipped: task heads"):
        update.delta("score.weight")


def test_the_base_is_known_once_one_expert_names_it():
    method = continual.make("weight_average")
    state = method.append(method.start(adapter(0)), adapter(1, base_model="org/base"))
    assert state.base_model == "org/base"
    assert method.update(state).base_model == "org/base"


def test_a_step_reads_zero_where_one_side_lacks_a_name():
    state = continual.make("weight_average").start(adapter(0))
    step = Step.of(state, Adapter({"fc1": layer(5), "fc3": layer(6)}, dense={"b": torch.ones(2)}, name="t1"))
    assert step.names == ["b", "fc1", "fc2", "fc3"]
    assert (step.new("fc2").rank, step.old("fc3").rank) == (0, 0)
    assert not step.old("b").any()
    assert State("m", "v", {}, shapes={"w": (2, 3)}).weight("w").shape == (2, 3)


def test_adapted_embeddings_and_convolutions_keep_their_kind(tmp_path):
    kinds = {"fc1": Kind("embedding"), "fc2": Kind("conv", (5, 1, 1))}
    experts = [adapter(k, kinds=kinds) for k in range(2)]
    for method in ("nufilt", "magmax"):
        update = continual.run(experts, method)[-1]
        assert dict(update.kinds) == kinds
        update.save(tmp_path / method)
