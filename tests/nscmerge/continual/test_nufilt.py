"""NUFILT: the reduced iteration against the objective as written, its limits, its options, its warnings."""

import warnings
from itertools import pairwise

import pytest
import torch

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense
from nscmerge.continual.nufilt_layer import prepare
from nscmerge.continual.nufilt_solve import solve_adam, solve_least_squares
from nscmerge.continual.right_vectors import right_vectors
from nscmerge.errors import AdapterError, MethodError, TargetError

RANKS = {"filter_rank": 6, "adapter_rank": 4, "task_rank": 2}


def matrix(d_out, d_in, seed, rank=None, decay=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    if rank is None and not decay:
        return x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = torch.arange(1, len(s) + 1, dtype=torch.float64) ** -decay
    rank = rank or len(s)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def layer(d_out, d_in, rank, seed):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank)))
    return LowRank(A, B, 0.4)


def expert(seed, rank=3):
    return Adapter({"a": layer(12, 9, rank, 10 * seed), "b": layer(8, 14, rank, 10 * seed + 1)}, name=f"e{seed}")


def both(old, new):
    return dense(old), dense(new)


def as_written(M, delta, H, p, q, steps, lr, filtered=True):
    """Dense, autograd, torch's Adam: (M_t, losses)."""
    Vp = torch.linalg.svd(M)[2][:p].T
    Vv = torch.linalg.svd(delta)[2][:q].T
    F = delta - delta @ Vp @ Vp.T if filtered else delta
    G = torch.zeros(delta.shape[1], H.shape[0], dtype=torch.float64, requires_grad=True)
    H = H.clone().requires_grad_()
    optimizer = torch.optim.Adam([G, H], lr=lr)
    losses = []
    for step in range(steps + 1):
        total = M + F + delta @ G @ H
        loss = ((total - M) @ Vp).square().sum() + ((total - delta) @ Vv).square().sum()
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return total.detach(), torch.tensor(losses, dtype=torch.float64)


CASES = {
    "tall": (matrix(20, 9, 0), matrix(20, 9, 1), 6, 2),
    "wide": (matrix(9, 20, 0), matrix(9, 20, 1), 6, 2),
    "factors": (layer(16, 12, 5, 0), layer(16, 12, 3, 1), 4, 2),
    "rank below r_p": (layer(16, 12, 2, 0), layer(16, 12, 3, 1), 2, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("filtered", [True, False])
def test_the_reduced_iteration_is_the_objective_as_written(case, filtered):
    old, new, p, q = CASES[case]
    M, delta = both(old, new)
    H = 0.02 * torch.randn(4, M.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    want, losses = as_written(M, delta, H, p, q, 300, 1e-2, filtered)
    wanted = 128 if case == "rank below r_p" else p
    made = prepare(old, new, filter_rank=wanted, task_rank=q, filtered=filtered)
    found = solve_adam(made.problem, H, steps=300, lr=1e-2)
    adapter = (made.problem.K @ found.G) @ found.H
    torch.testing.assert_close(found.losses + made.problem.outside, losses, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dense(made.fused(adapter)), want, rtol=1e-7, atol=1e-8)
    assert sum(made.problem.losses(adapter)) == pytest.approx(float(losses[-1]), rel=1e-8)
    assert sum(made.problem.losses(None)) == pytest.approx(float(losses[0]), rel=1e-10)


def test_the_first_gradient_is_autograds():
    old, new, _, _ = CASES["tall"]
    made = prepare(old, new, filter_rank=6, task_rank=2)
    problem = made.problem
    H = 0.02 * torch.randn(4, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    G = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
    ((problem.K @ G) @ (H @ problem.V) - problem.target).square().sum().backward()
    assert solve_adam(problem, H, steps=1, lr=1e-3).gradient_rms == pytest.approx(float(G.grad.square().mean().sqrt()))


@pytest.mark.parametrize("case", CASES)
def test_never_below_the_closed_form(case):
    old, new, p, q = CASES[case]
    made = prepare(old, new, filter_rank=p, task_rank=q)
    exact = sum(made.problem.losses(solve_least_squares(made.problem, True)))
    stability = made.problem.losses(solve_least_squares(made.problem, True))[0]
    assert stability < 1e-18
    for steps, lr in ((50, 1e-3), (2000, 1e-2)):
        H = 0.02 * torch.randn(4, dense(old).shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        found = solve_adam(made.problem, H, steps=steps, lr=lr)
        reached = sum(made.problem.losses((made.problem.K @ found.G) @ found.H))
        assert reached >= exact - 1e-10
    assert reached <= exact + 0.05 * sum(made.problem.losses(None))


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_the_first_expert_comes_out_exactly(form):
    first = expert(0)
    single = Adapter({n: LowRank(x.A.bfloat16(), x.B.bfloat16(), 1 / 3) for n, x in first.layers.items()})
    if form == "dense":
        whole = Adapter(dense={f"{n}.weight": x.dense() for n, x in single.layers.items()}, linear=["a", "b"])
        update = continual.run([whole], "nufilt")[0]
        assert all(torch.equal(update.delta(f"{n}.weight"), x.dense()) for n, x in single.layers.items())
    else:
        update = continual.run([single], "nufilt")[0]
        assert all(torch.equal(update.delta(n), x.dense()) for n, x in single.layers.items())


@pytest.mark.parametrize("form", [lambda e: e, lambda e: whole(e)], ids=["factors", "dense"])
class TestLimits:
    def test_filter_only_leaves_the_old_directions_alone(self, form):
        states = list(continual.steps([form(expert(i)) for i in range(4)], "nufilt", **RANKS | {"adapter_rank": 0}))
        for before, after in pairwise(states):
            for name in after.merged:
                M, new = dense(before.weight(name)), dense(after.weight(name))
                Vp = right_vectors(M, 6, svd="exact", seed=0)
                torch.testing.assert_close(new @ Vp, M @ Vp, rtol=1e-11, atol=1e-11)

    def test_a_zero_expert_changes_nothing(self, form):
        zero = Adapter({n: LowRank(0 * x.A, x.B) for n, x in expert(1).layers.items()}, name="zero")
        states = list(continual.steps([form(expert(0)), form(zero)], "nufilt", **RANKS))
        assert all(torch.equal(dense(states[0].weight(n)), dense(states[1].weight(n))) for n in states[1].merged)

    def test_the_same_expert_again_is_filtered_away(self, form):
        # Rank 3 is below filter_rank, so nothing of it lies outside V_p, and no residual is left to fit.
        first, again = expert(0), Adapter(expert(0).layers, name="again")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            states = list(continual.steps([form(first), form(again)], "nufilt", **RANKS))
        for name in states[1].merged:
            torch.testing.assert_close(
                dense(states[1].weight(name)), dense(states[0].weight(name)), rtol=1e-11, atol=1e-11
            )

    def test_the_same_expert_again_keeps_its_part_outside(self, form):
        first, again = expert(0, rank=5), Adapter(expert(0, rank=5).layers, name="again")
        options = {"filter_rank": 2, "adapter_rank": 0}
        states = list(continual.steps([form(first), form(again)], "nufilt", **options))
        for name in states[1].merged:
            delta = dense(states[0].weight(name))
            _, _, vh = torch.linalg.svd(delta)
            want = 2 * delta - delta @ vh[:2].T @ vh[:2]
            torch.testing.assert_close(dense(states[1].weight(name)), want, rtol=1e-10, atol=1e-10)

    def test_no_filter_rank_and_no_adapter_is_the_sum(self, form):
        got = list(continual.steps([form(expert(i)) for i in range(3)], "nufilt", filter_rank=0, adapter_rank=0))[-1]
        for name in got.merged:
            want = sum(expert(i).layers[name.removesuffix(".weight")].dense() for i in range(3))
            torch.testing.assert_close(dense(got.weight(name)), want, rtol=1e-12, atol=1e-12)

    def test_no_task_rank_leaves_the_adapter_at_zero(self, form):
        experts = [form(expert(i)) for i in range(2)]
        a = list(continual.steps(experts, "nufilt", **RANKS | {"task_rank": 0}))[-1]
        b = list(continual.steps(experts, "nufilt", **RANKS | {"adapter_rank": 0}))[-1]
        for name in a.merged:
            torch.testing.assert_close(dense(a.weight(name)), dense(b.weight(name)), rtol=1e-12, atol=1e-12)

    def test_ranks_beyond_the_layer_are_capped(self, form):
        update = continual.run([form(expert(i, rank=9)) for i in range(2)], "nufilt", filter_rank=999, task_rank=999)
        log = update[-1].recipe.extra["continual"]["steps"][-1]["log"]
        assert all(line["filter_rank"] <= 9 and line["task_rank"] <= 9 for line in log.values())

    def test_steps_lower_the_logged_loss(self, form):
        log = continual.run([form(expert(i)) for i in range(2)], "nufilt", **RANKS)[-1].recipe.extra["continual"]
        assert log["steps"][0]["log"].keys() == log["steps"][1]["log"].keys()
        for line in log["steps"][1]["log"].values():
            assert line["stability_before"] == 0
            assert line["loss_after"] < line["loss_before"]
            assert line["loss_after"] == pytest.approx(line["stability_after"] + line["plasticity_after"])


def whole(e):
    return Adapter(dense={f"{n}.weight": x.dense() for n, x in e.layers.items()}, linear=list(e.layers), name=e.name)


class TestDraws:
    def test_the_seed_decides_and_layers_differ(self):
        experts = [expert(0), expert(1)]
        one, same, other = (continual.run(experts, "nufilt", seed=s, **RANKS)[-1].delta("a") for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_factors_and_dense_draw_the_same(self):
        low = list(continual.steps([expert(0), expert(1)], "nufilt", **RANKS))[-1]
        full = list(continual.steps([whole(expert(0)), whole(expert(1))], "nufilt", **RANKS))[-1]
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
