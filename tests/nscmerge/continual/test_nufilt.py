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
from tests.nscmerge.continual.experts import checkpoint, expert, layer, matrix

RANKS = {"filter_rank": 6, "adapter_rank": 4, "task_rank": 2}


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


@pytest.mark.parametrize("form", [lambda e: e, checkpoint], ids=["factors", "dense"])
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
