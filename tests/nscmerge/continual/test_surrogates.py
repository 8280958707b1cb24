"""Stability, plasticity and affinity: the golden numbers, direct computation on inputs, and edges."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.affinity import affinity, data_subspace, subspace_affinity
from nscmerge.continual.surrogates import (
    harmonic_mean,
    on_activations,
    on_subspaces,
    second_moment,
    top_vectors,
    total,
    traced,
)
from nscmerge.errors import MethodError, ShapeError

HERE = Path(__file__).parents[2] / "golden" / "continual"
GOLDEN = json.loads((HERE / "metrics.json").read_text())
BASE = load_file(HERE / "theta0.safetensors")
INPUTS = {t: load_file(HERE / "metrics_inputs.safetensors")[f"activations/task{t}"].double() for t in range(1, 5)}
LAYER = GOLDEN["surrogates"]["layer"]


def experts():
    return [
        Adapter(
            dense={
                n: x.double() - BASE[n].double() for n, x in load_file(HERE / f"dense/task_{t}.safetensors").items()
            },
            linear=["fc1", "fc2"],
            name=f"task_{t}",
        )
        for t in range(1, 5)
    ]


def golden_steps():
    tensors = load_file(HERE / "nufilt_init.safetensors")
    init = [{n: tensors[f"A0/t{t}/{n}.weight"] for n in ("fc1", "fc2")} for t in (2, 3, 4)]
    ranks = {"filter_rank": 6, "adapter_rank": 4, "task_rank": 2}
    return list(continual.steps(experts(), "nufilt", init=init, layers=["fc1", "fc2"], **ranks))


def test_losses_on_activations_equal_the_golden_numbers():
    states, deltas = golden_steps(), [one.dense[LAYER] for one in experts()]
    moments = {t: second_moment(x) for t, x in INPUTS.items()}
    for want in GOLDEN["surrogates"]["values"]:
        t = want["step"]
        old, merged = (states[i].weight(LAYER) for i in (t - 2, t - 1))
        earlier = sum(moments[i] for i in range(1, t)) / (t - 1)
        stab, plas = on_activations(old, merged, deltas[t - 1], earlier, moments[t])
        assert stab == pytest.approx(want["stab"], rel=1e-8)
        assert plas == pytest.approx(want["plas"], rel=1e-8)
        assert harmonic_mean(stab, plas) == pytest.approx(want["harmonic"], rel=1e-8)


def test_affinity_equals_the_golden_numbers():
    case = GOLDEN["affinity"]
    deltas = [one.dense[case["layer"]] for one in experts()]
    got = [[affinity(d, second_moment(INPUTS[t]), case["r_v"], case["r_d"]) for d in deltas] for t in range(1, 5)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(case["values"]), rtol=1e-8, atol=0)


def test_the_losses_are_those_of_a_forward_pass():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old, new = LowRank(draw(2, 7), draw(5, 2), 0.5), LowRank(draw(3, 7), draw(5, 3), 2.0)
    merged = LowRank(draw(4, 7), draw(5, 4))
    first, second, own = draw(11, 7), draw(11, 7), draw(13, 7)
    stab, plas = on_activations(
        old, merged, new, (second_moment(first) + second_moment(second)) / 2, second_moment(own)
    )

    def mean_square(x, matrix):
        return float((x @ matrix.T).square().sum(1).mean())

    step = merged.dense() - old.dense()
    assert stab == pytest.approx((mean_square(first, step) + mean_square(second, step)) / 2, rel=1e-12)
    assert plas == pytest.approx(mean_square(own, merged.dense() - new.dense()), rel=1e-12)
    whole = on_activations(old.dense(), merged.dense(), new.dense(), second_moment(first), second_moment(own))
    factors = on_activations(old, merged, new, second_moment(first), second_moment(own))
    assert whole == pytest.approx(factors, rel=1e-12)
    # The same in parameter space: squared norms on the singular vectors themselves.
    v_p, v_v = (torch.linalg.svd(x.dense())[2][:n].T for x, n in ((old, 2), (new, 3)))
    expected = float((step @ v_p).square().sum()), float(((merged.dense() - new.dense()) @ v_v).square().sum())
    assert on_subspaces(old, merged, new) == pytest.approx(expected, rel=1e-10)
    assert on_subspaces(old.dense(), merged.dense(), new.dense()) == pytest.approx(expected, rel=1e-10)


def test_a_filter_alone_is_silent_on_what_was_there():
    one, two = experts()[:2]
    first, second = continual.steps([one, two], "nufilt", filter_rank=6, adapter_rank=0)
    old, merged = first.weight(LAYER), second.weight(LAYER)
    assert on_subspaces(old, merged, two.dense[LAYER], 6, 2)[0] == pytest.approx(0, abs=1e-20)
    assert on_subspaces(old, merged, two.dense[LAYER], 24, 2)[0] > 1e-3


def test_first_steps_zeros_and_empty_means():
    zero, new = LowRank(torch.zeros(0, 4), torch.zeros(3, 0)), LowRank(torch.ones(1, 4), torch.ones(3, 1))
    assert on_subspaces(zero, new, new) == (0.0, 0.0)
    assert on_activations(zero, new, new, None, torch.eye(4)) == (0.0, 0.0)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(1.0, 3.0) == 1.5
    assert total([]) == (0.0, 0.0)
    assert total([(1.0, 2.0), (3.0, 6.0)]) == (2.0, 4.0)
    assert traced(zero, torch.eye(4)) == 0.0
    assert top_vectors(new, 8).shape == (4, 1)  # no more than the rank


def test_affinity_of_equal_and_of_unrelated_subspaces():
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert subspace_affinity(basis[:, :5], basis[:, 1:4]) == pytest.approx(1.0)
    assert subspace_affinity(basis[:, :5], basis[:, 5:8]) == pytest.approx(0.0, abs=1e-12)
    moment = basis @ torch.diag(torch.arange(16, 0, -1, dtype=torch.float64)) @ basis.T
    found = data_subspace(moment, 3)
    torch.testing.assert_close((found.T @ basis[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    many = [
        subspace_affinity(
            torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(i))).Q, basis[:, :4]
        )
        for i in range(400)
    ]
    assert sum(many) / len(many) == pytest.approx(4 / 16, abs=0.02)  # r_v / d_in, as specified


def test_says_what_does_not_fit():
    with pytest.raises(MethodError, match="data_rank 9 is above task_rank 8"):
        affinity(torch.eye(16), torch.eye(16), 8, 9)
    with pytest.raises(ShapeError, match=r"\(4, 5\), rank 2; expected a square matrix"):
        data_subspace(torch.zeros(4, 5), 2)
    with pytest.raises(ShapeError, match="rank 5; expected a square matrix and a rank from 1 to its size"):
        data_subspace(torch.eye(4), 5)
    with pytest.raises(ShapeError, match="task vector has 6 inputs, data 7"):
        subspace_affinity(torch.eye(6), torch.eye(7))
