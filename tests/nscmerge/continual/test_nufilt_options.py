"""NUFILT's options: what is drawn, which weights are treated, variants, warnings, and whose singular vectors."""

import warnings

import pytest
import torch

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense
from nscmerge.continual.right_vectors import right_vectors
from nscmerge.errors import AdapterError, MethodError, TargetError
from tests.nscmerge.continual.experts import checkpoint, expert, matrix

RANKS = {"filter_rank": 6, "adapter_rank": 4, "task_rank": 2}


class TestDraws:
    def test_layers_and_steps_draw_for_themselves(self):
        method = continual.make("nufilt", **RANKS)
        drawn = [method._start(module, 9, t) for module, t in (("a", 2), ("b", 2), ("a", 3), ("a", 2))]
        assert torch.equal(drawn[0], drawn[3])
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        many = continual.make("nufilt", adapter_rank=100, sigma_init=0.02)._start("a", 200, 2)
        assert float(many.std()) == pytest.approx(0.02, rel=0.02)

    def test_the_seed_decides(self):
        experts = [expert(0), expert(1)]
        one, same, other = (continual.run(experts, "nufilt", seed=s, **RANKS)[-1].delta("a") for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_factors_and_dense_draw_the_same(self):
        low = list(continual.steps([expert(0), expert(1)], "nufilt", **RANKS))[-1]
        full = list(continual.steps([checkpoint(expert(0)), checkpoint(expert(1))], "nufilt", **RANKS))[-1]
        torch.testing.assert_close(dense(low.weight("a")), full.weight("a.weight"), rtol=1e-9, atol=1e-9)

    def test_given_starts_are_checked(self):
        experts = [expert(0), expert(1)]
        good = {"a": torch.zeros(4, 9), "b": torch.zeros(4, 14)}
        with pytest.raises(MethodError, match=r"init has 0 entries.*init\[0\]"):
            continual.run(experts, "nufilt", init=[], **RANKS)
        with pytest.raises(MethodError, match=r"no layer 'b'.*Known: a"):
            continual.run(experts, "nufilt", init=[{"a": good["a"]}], **RANKS)
        with pytest.raises(MethodError, match=r"is \(4, 9\); expected \(adapter_rank, d_in\) = \(4, 14\)"):
            continual.run(experts, "nufilt", init=[good | {"b": good["a"]}], **RANKS)

    def test_given_starts_are_no_part_of_the_state(self):
        good = [{"a.weight": torch.ones(4, 9), "b": torch.ones(4, 14)}]
        method = continual.make("nufilt", init=good, **RANKS)
        state = method.append(method.start(expert(0)), expert(1))
        assert "init" not in state.options
        assert any("given" in note for note in method.update(state).recipe.notes)


class TestTinyTaskVectors:
    @staticmethod
    def scaled(scale):
        return [
            Adapter({n: LowRank(x.A, x.B, scale * x.scaling) for n, x in expert(i).layers.items()}, name=f"e{i}")
            for i in range(2)
        ]

    def test_warn(self):
        with pytest.warns(UserWarning, match=r"in 2 of 2 layers.*normalize=True"):
            continual.run(self.scaled(1e-6), "nufilt", **RANKS)

    def test_normalized_they_do_as_large_ones_do(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            small = continual.run(self.scaled(1e-6), "nufilt", normalize=True, **RANKS)[-1]
            large = continual.run(self.scaled(1.0), "nufilt", normalize=True, **RANKS)[-1]
        torch.testing.assert_close(1e6 * small.delta("a"), large.delta("a"), rtol=1e-4, atol=1e-5)
        logs = [u.recipe.extra["continual"]["steps"][-1]["log"]["a"] for u in (small, large)]
        assert logs[0]["loss_after"] * 1e12 == pytest.approx(logs[1]["loss_after"], rel=1e-6)


class TestSelection:
    @staticmethod
    def checkpoints():
        return [
            Adapter(
                dense={"fc1.weight": matrix(6, 5, s), "fc2.weight": matrix(5, 6, s), "fc1.bias": torch.ones(6),
                       "embed.weight": matrix(7, 5, s)},
                linear=["fc1", "fc2"],
                name=str(s),
            )
            for s in range(2)
        ]  # fmt: skip

    @pytest.mark.parametrize("layers", [["fc1"], ["fc1.weight"], ["*1"]])
    def test_only_selected_weights_move(self, layers):
        update = continual.run(self.checkpoints(), "nufilt", layers=layers)[-1]
        assert bool(update.delta("fc1.weight").any())
        for name, shape in (("fc2.weight", (5, 6)), ("fc1.bias", (6,)), ("embed.weight", (7, 5))):
            assert torch.equal(update.delta(name), torch.zeros(shape))

    def test_all_linear_by_default(self):
        update = continual.run(self.checkpoints(), "nufilt")[0]
        assert [bool(update.delta(n).any()) for n in ("fc1.weight", "fc2.weight", "embed.weight")] == [
            True,
            True,
            False,
        ]

    def test_names_that_fit_nothing(self):
        with pytest.raises(TargetError, match=r"no linear layer 'fc3'; did you mean 'fc\d'\? Known: fc1, fc2"):
            continual.run(self.checkpoints(), "nufilt", layers=["fc3"])
        with pytest.raises(MethodError, match="expected a list"):
            continual.make("nufilt", layers=[])

    def test_who_is_linear_has_to_be_said(self):
        unsaid = [Adapter(dense=e.dense, name=e.name) for e in self.checkpoints()]
        for method in ("nufilt", "opcm", "knots_ties"):
            with pytest.raises(AdapterError, match=r"3 matrices.*linear="):
                continual.run(unsaid, method)
        assert bool(continual.run(unsaid, "nufilt", layers=["fc1"])[0].delta("fc1.weight").any())
        with pytest.raises(TargetError, match="nothing to filter"):
            continual.run([Adapter(dense={"b": torch.ones(3)}, linear=["fc1"])], "nufilt")

    def test_adapted_layers_can_be_left_out(self, tmp_path):
        update = continual.run([expert(0), expert(1)], "nufilt", layers=["a"])[-1]
        assert not update.delta("b").any()
        assert update.delta("b").shape == (8, 14)
        update.save(tmp_path / "merge")

    @pytest.mark.parametrize(("rule", "want"), [("base", 0.0), ("average", 2.0), ("method", 0.0)])
    def test_whole_tensors_beside_adapters(self, rule, want):
        experts = [
            Adapter(expert(k).layers, dense={"projector.bias": torch.full((4,), v)}, name=str(k))
            for k, v in enumerate((1.0, 3.0))
        ]
        got = continual.run(experts, "nufilt", dense_extras=rule, **RANKS)[-1].delta("projector.bias")
        assert torch.equal(got, torch.full((4,), want))

    def test_a_projector_by_the_method(self):
        experts = [
            Adapter(expert(k).layers, dense={"projector.weight": matrix(6, 5, k)}, linear=["projector"], name=str(k))
            for k in range(2)
        ]
        got = continual.run(experts, "nufilt", dense_extras="method", **RANKS)[-1].delta("projector.weight")
        alone = [Adapter(dense=e.dense, linear=["projector"], name=e.name) for e in experts]
        torch.testing.assert_close(got, continual.run(alone, "nufilt", **RANKS)[-1].delta("projector.weight"))


class TestVariants:
    def test_papercode_masks_the_first_columns_of_the_first_expert(self):
        first = TestSelection.checkpoints()[0]
        got = continual.run([first], "nufilt", "papercode", filter_rank=3)[0].delta("fc1.weight")
        want = first.dense["fc1.weight"].clone()
        want[:, :3] = 0
        assert torch.equal(got, want.float())

    def test_papercode_is_undefined_on_adapters(self):
        with pytest.raises(MethodError, match="no rank rule"):
            continual.run([expert(0)], "nufilt", "papercode")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"filter_rank": -1}, "filter_rank is -1; expected a whole number >= 0"),
            ({"steps": 1.5}, "steps is 1.5"),
            ({"lr": 0.0}, "lr is 0.0"),
            ({"solver": "sgd"}, "solver is 'sgd'.*'least_squares'"),
            ({"filter": 1}, "filter is 1"),
            ({"svd": "random"}, "did you mean 'randomized'"),
            ({"dense_extras": "mean"}, "dense_extras"),
            ({"filter_ranks": 3}, "no option 'filter_ranks'; did you mean 'filter_rank'"),
        ],
    )
    def test_options_out_of_range(self, options, match):
        with pytest.raises(MethodError, match=match):
            continual.make("nufilt", **options)


class TestRightVectors:
    X = matrix(60, 80, 3, decay=0.5)

    def overlap(self, v, count=8):
        true = torch.linalg.svd(self.X)[2][:count].T
        return float((true.T @ v).square().sum()) / count

    @pytest.mark.parametrize("turned", [False, True])
    def test_by_gram(self, monkeypatch, turned):
        monkeypatch.setattr("nscmerge.continual.right_vectors.LARGEST_SVD", 4)
        x = self.X.T if turned else self.X
        v = right_vectors(x, 8, svd="exact", seed=0)
        true = torch.linalg.svd(x)[2][:8].T
        torch.testing.assert_close(v @ v.T, true @ true.T, rtol=1e-9, atol=1e-9)

    def test_randomized_is_near_seeded_and_leaves_the_global_generator(self):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        v = right_vectors(self.X, 8, svd="randomized", seed=3)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(v, right_vectors(self.X, 8, svd="randomized", seed=3))
        assert 0.999 < self.overlap(v) <= 1 + 1e-9

    def test_no_more_than_the_rank(self):
        assert right_vectors(matrix(20, 30, 0, rank=5), 8, svd="exact", seed=0).shape == (30, 5)
        assert right_vectors(torch.zeros(4, 6), 3, svd="exact", seed=0).shape == (6, 0)

    def test_a_run_with_it_says_so(self):
        experts = [Adapter(dense={"w.weight": matrix(80, 70, s, decay=1.0)}, linear=["w"], name=str(s)) for s in (0, 1)]
        options = {"filter_rank": 8, "adapter_rank": 4, "task_rank": 2}
        exact, near = (continual.run(experts, "nufilt", svd=svd, **options)[-1] for svd in ("exact", "randomized"))
        assert any("randomised" in note for note in near.recipe.notes)
        assert not exact.recipe.notes
        difference = (exact.delta("w.weight") - near.delta("w.weight")).norm() / exact.delta("w.weight").norm()
        assert float(difference) < 0.02
