"""One task's weights as a mask on shared ones."""

import pytest
import torch

from nscmerge import LowRank, Update
from nscmerge.errors import AdapterError
from nscmerge.lazy import Lazy
from nscmerge.masked import MaskedWeights, agreeing
from nscmerge.update import Recipe

TAU = torch.tensor([[2.0, 2.0, 2.0], [-3.0, -3.0, 0.0]])
OWN = LowRank(torch.tensor([[1.0, -1.0, 0.0]]), torch.ones(2, 1, dtype=torch.bfloat16), 0.5)
KEPT = torch.tensor([[4.0, 0.0, 0.0], [0.0, -6.0, 0.0]])


def masked(shared=None):
    shared = {"l": TAU, "m": torch.ones(2, 2), "p.bias": torch.tensor([1.0, -1.0])} if shared is None else shared
    return MaskedWeights(shared, {"l": OWN}, {"p.bias": torch.tensor([5.0, 5.0])}, 2.0)


def test_keeps_what_agrees_in_sign():
    weights = masked()
    assert list(weights) == ["l", "m", "p.bias"]
    assert len(weights) == 3
    assert "l" in weights
    assert "x" not in weights
    assert torch.equal(weights["l"], KEPT)
    assert torch.equal(weights["p.bias"], torch.tensor([2.0, 0.0]))
    assert torch.equal(weights["m"], torch.zeros(2, 2))  # a layer that the task lacks
    with pytest.raises(KeyError):
        weights["x"]


def test_signs_survive_where_products_underflow():
    tiny = torch.tensor([1e-30, -1e-30, 0.0])
    assert agreeing(tiny, tiny).tolist() == tiny.tolist()
    assert (tiny * tiny > 0).tolist() == [False] * 3  # what a product would have said
    assert agreeing(-tiny, tiny).tolist() == [0.0] * 3


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0])
def test_scaled_by_any_factor(factor):
    weights = masked()
    once = weights.scaled(factor)
    for name in weights:
        assert torch.equal(once[name], factor * weights[name] + 0.0)
    if factor:
        assert torch.equal(once.scaled(1 / factor)["l"], KEPT)  # a sign turned twice is as before


def test_an_update_scales_without_growing_dense():
    weights = masked()
    layers = {n: t for n, t in weights.shared.items() if n != "p.bias"}
    recipe = Recipe("emr", options={"lam": 1.0})
    update = Update(layers, {"p.bias": weights.shared["p.bias"]}, per_task={"a": weights}, recipe=recipe).scaled(-3.0)
    assert isinstance(update.per_task["a"], MaskedWeights)
    assert torch.equal(update.delta("l", "a"), -3.0 * KEPT + 0.0)
    assert torch.equal(update.delta("l"), -3.0 * TAU)


def test_nothing_is_computed_before_it_is_asked_for():
    def fail(name):
        raise ArithmeticError(name)

    weights = masked(Lazy(["l", "p.bias"], fail)).scaled(2.0)
    assert list(weights) == ["l", "p.bias"]
    with pytest.raises(ArithmeticError, match="l"):
        weights["l"]


def test_half_precision_shared_weights_keep_their_signs():
    half = masked({"l": TAU.bfloat16(), "p.bias": torch.ones(2).bfloat16()})
    assert half["l"].dtype == torch.float32
    assert torch.equal(half["l"], KEPT)


def test_a_task_may_not_have_more_than_is_shared():
    with pytest.raises(AdapterError, match=r"no shared layer or tensor 'l'.*Known: p.bias"):
        masked({"p.bias": torch.ones(2)})
