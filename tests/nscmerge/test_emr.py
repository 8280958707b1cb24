"""EMR against a dense oracle that keeps everything at once, by hand, and at its edges."""

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError
from nscmerge.masked import MaskedWeights
from nscmerge.methods.emr import elect

SHAPES = {"a.q": (7, 9), "b.o": (4, 11)}
TASKS = "xyz"


def experts(*ranks, whole=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Adapter(
            {
                name: LowRank(
                    torch.randn(rank, d_in, generator=generator),
                    torch.randn(d_out, rank, generator=generator),
                    0.5 + k,
                )
                for name, (d_out, d_in) in SHAPES.items()
            },
            dense={"p.bias": torch.randn(5, generator=generator)} if whole else {},
            name=TASKS[k],
        )
        for k, rank in enumerate(ranks)
    ]


def deltas(adapters, name):
    layers = [a.layers[name].dense() if name in a.layers else a.dense[name] for a in adapters]
    return torch.stack(layers).double()


def oracle(adapters, rescale="tensor"):
    """Everything dense and at once, straight from the definition: {name: tau}, {name: masks (K, ...)}, rho (K,)."""
    names = [*adapters[0].layers, *adapters[0].dense]
    tau, masks, own, kept = {}, {}, 0, 0
    for name in names:
        v = deltas(adapters, name)
        g = torch.where(v.sum(0) > 0, 1.0, -1.0).double()
        masks[name] = v * g > 0
        tau[name] = g * torch.where(masks[name], v.abs(), 0).amax(0)
        dims = tuple(range(1, v.ndim))
        take = torch.mean if rescale == "tensor" else torch.sum
        own = own + take(v.abs(), dim=dims)
        kept = kept + take((tau[name] * masks[name]).abs(), dim=dims)
    return tau, masks, own / kept


@pytest.mark.parametrize("rescale", ["tensor", "global"])
@pytest.mark.parametrize("ranks", [(3,), (2, 2), (1, 4, 3)])
def test_equals_the_dense_oracle(ranks, rescale):
    adapters = experts(*ranks)
    tau, masks, rho = oracle(adapters, rescale)
    update = merge(adapters, "emr", lam=0.5, rescale=rescale)
    assert list(update.recipe.extra["rescalers"].values()) == pytest.approx(rho.tolist(), rel=1e-6)
    for name in tau:
        torch.testing.assert_close(update.delta(name).double(), 0.5 * tau[name], rtol=1e-6, atol=1e-7)
        for k, adapter in enumerate(adapters):
            expected = 0.5 * rho[k] * tau[name] * masks[name][k]
            torch.testing.assert_close(update.delta(name, adapter.name).double(), expected, rtol=1e-6, atol=1e-7)


def test_by_hand():
    values = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -2.0, -4.0, 0.0], [-2.0, 0.0, 6.0, 0.0]])
    #                      sums          2.0   0.0   1.0  0.0
    assert elect(iter(values)).tolist() == [3.0, -2.0, 6.0, 0.0]  # an exact 0 elects minus,
    assert elect(iter(values), zero_is_plus=True).tolist() == [3.0, 2.0, 6.0, 0.0]  # or plus in the papercode
    adapters = [Adapter({"l": LowRank(v[None], torch.ones(1, 1))}, name=TASKS[k]) for k, v in enumerate(values)]
    update = merge(adapters, "emr")
    # mean|v| over mean|tau m|: (4/4) / (3/4), (9/4) / (5/4), (8/4) / (6/4)
    assert update.recipe.extra["rescalers"] == pytest.approx({"x": 4 / 3, "y": 9 / 5, "z": 8 / 6})
    assert update.delta("l", "y").tolist() == [[pytest.approx(3 * 9 / 5), pytest.approx(-2 * 9 / 5), 0, 0]]
    papercode = merge(adapters, "emr", variant="papercode", lam=0.5)
    assert papercode.delta("l").tolist() == [[1.5, 1.0, 3.0, 0.0]]
    assert not papercode.per_task
    with pytest.raises(MethodError, match="one update for all tasks"):
        papercode.delta("l", "x")


def test_transposed_tensors_are_as_good_as_any():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 5, generator=generator) for _ in TASKS]
    straight = merge([Adapter(dense={"p": v}, name=n) for v, n in zip(values, TASKS, strict=True)], "emr")
    turned = [Adapter(dense={"p": v.T.contiguous().T}, name=n) for v, n in zip(values, TASKS, strict=True)]
    assert not turned[0].dense["p"].is_contiguous()
    for task in (None, *TASKS):
        assert torch.equal(merge(turned, "emr").delta("p", task), straight.delta("p", task))


def test_large_tensors_are_elected_part_by_part():
    generator = torch.Generator().manual_seed(0)
    adapters = [Adapter(dense={"p": torch.randn(700, 800, generator=generator)}, name=n) for n in TASKS]
    tau, masks, rho = oracle(adapters)
    update = merge(adapters, "emr")
    torch.testing.assert_close(update.delta("p").double(), tau["p"])
    torch.testing.assert_close(update.delta("p", "y").double(), rho[1] * tau["p"] * masks["p"][1], rtol=1e-6, atol=1e-6)


def test_equal_experts_and_a_single_one_come_back():
    one = experts(3)[0]
    for k in (1, 3):
        update = merge({name: one for name in TASKS[:k]}, "emr")
        assert set(update.recipe.extra["rescalers"].values()) == {1.0}
        for name in (*SHAPES, "p.bias"):
            expected = deltas([one], name)[0].float()
            assert torch.equal(update.delta(name, "x"), expected)
            assert torch.equal(update.delta(name), expected)


def test_the_rescaler_ignores_a_common_scale_and_lam():
    plain = merge(experts(2, 3, whole=False), "emr")
    scaled = [
        Adapter({n: LowRank(e.A, e.B, 3 * e.scaling) for n, e in a.layers.items()}, name=a.name)
        for a in experts(2, 3, whole=False)
    ]
    for update in (merge(scaled, "emr"), merge(experts(2, 3, whole=False), "emr", lam=-0.7)):
        assert update.recipe.extra["rescalers"] == pytest.approx(plain.recipe.extra["rescalers"], rel=1e-6)


@pytest.mark.parametrize("lam", [0.5, -0.7])
def test_lam_of_either_sign_leaves_the_masks_alone(lam):
    unit, other = merge(experts(2, 3, 1), "emr"), merge(experts(2, 3, 1), "emr", lam=lam)
    for update in (other, unit.scaled(lam), other.scaled(-2.0).scaled(-0.5)):
        for name in (*SHAPES, "p.bias"):
            for task in (None, *TASKS):
                torch.testing.assert_close(update.delta(name, task), lam * unit.delta(name, task))


def test_a_task_without_a_layer_or_without_any_update():
    adapters = experts(2, 3, 2, whole=False)
    zero = Adapter({n: LowRank(e.A, 0 * e.B) for n, e in adapters[1].layers.items()}, name="y")
    lacking = Adapter({"a.q": adapters[2].layers["a.q"]}, name="z")
    update = merge([adapters[0], zero, lacking], "emr")
    rescalers = update.recipe.extra["rescalers"]
    assert rescalers["y"] == 1.0  # nothing is kept, so there is nothing to rescale
    for task in TASKS:
        for name in SHAPES:
            assert bool(torch.isfinite(update.delta(name, task)).all())
    assert not update.delta("a.q", "y").any()
    assert not update.delta("b.o", "z").any()
    torch.testing.assert_close(update.delta("b.o"), adapters[0].layers["b.o"].dense())
    # Tensors that a task lacks count as zeros in its sums, and so add nothing.
    own, tau = lacking.layers["a.q"].dense(), update.delta("a.q")
    kept = tau * (own * tau > 0)
    assert rescalers["z"] == pytest.approx(float(own.abs().mean() / kept.abs().mean()), rel=1e-6)
    torch.testing.assert_close(update.delta("a.q", "z"), rescalers["z"] * kept)


def test_an_expert_that_loses_every_election_keeps_nothing():
    strong = LowRank(torch.ones(1, 3), torch.full((2, 1), 5.0))
    update = merge({"x": Adapter({"l": strong}), "y": Adapter({"l": LowRank(strong.A, -strong.B, 0.1)})}, "emr")
    assert update.recipe.extra["rescalers"] == {"x": 1.0, "y": 1.0}
    assert not update.delta("l", "y").any()


def test_opposite_experts_cancel_in_sum_alone():
    (one,) = experts(2, whole=False)
    minus = Adapter({n: LowRank(e.A, -e.B, e.scaling) for n, e in one.layers.items()}, name="y")
    update = merge([one, minus], "emr")
    assert torch.equal(update.delta("a.q"), -one.layers["a.q"].dense().abs())


def test_per_task_weights_are_masks_on_one_shared_update():
    update = merge(experts(2, 3), "emr")
    first, second = update.per_task["x"], update.per_task["y"]
    assert isinstance(first, MaskedWeights)
    assert first.shared is second.shared
    with pytest.raises(MethodError, match=r"no task 'w'"):
        update.delta("a.q", "w")


def test_refuses_another_rescaler():
    for value in ("tensors", 1):
        with pytest.raises(MethodError, match=r"emr: rescale is .*; .*expected one of 'tensor', 'global'"):
            merge(experts(2), "emr", rescale=value)
