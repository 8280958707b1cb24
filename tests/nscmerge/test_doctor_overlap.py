"""Ranks, norms, overlaps and cosines against dense oracles; grouping of layers; estimates by hand."""

import math
from itertools import combinations

import pytest
import torch

from nscmerge import Adapter, LowRank
from nscmerge.doctor.estimate import COSTS, Shape, Speed, estimate
from nscmerge.doctor.examine import natural
from nscmerge.doctor.overlap import survey
from nscmerge.doctor.show import group
from nscmerge.methods import METHODS


def adapters(ranks, seed=0, d_in=13, d_out=11, layers=("l.0", "l.1")):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k, rank in enumerate(ranks):
        factors = {
            layer: LowRank(
                torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 0.5 + k
            )
            for layer in layers
        }
        made[f"t{k}"] = Adapter(factors, name=f"t{k}")
    return made


def projector(matrix):
    """The orthogonal projector on the row space, through the pseudo-inverse."""
    return torch.linalg.pinv(matrix.double()) @ matrix.double()


def dense_overlap(a, b):
    """tr(P_a P_b) / min(rank): the squared cosines of the principal angles, without any basis."""
    p, q = projector(a), projector(b)
    return float(torch.trace(p @ q) / min(torch.trace(p), torch.trace(q)))


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4, 2), (20, 3)])  # 20: more than the layer is wide
def test_equals_the_dense_numbers(ranks):
    experts = adapters(ranks)
    found = survey(experts)
    for first, second in combinations(experts, 2):
        one, two = experts[first].layers, experts[second].layers
        got = found.overlaps[first, second]
        rows = [dense_overlap(one[n].A, two[n].A) for n in one]
        columns = [dense_overlap(one[n].B.T, two[n].B.T) for n in one]
        deltas = [torch.cat([layers[n].dense().double().flatten() for n in one]) for layers in (one, two)]
        cosine = torch.nn.functional.cosine_similarity(*deltas, dim=0)
        assert got.layers == 2
        assert got.rows == pytest.approx(sum(rows) / 2, abs=1e-9)
        assert got.columns == pytest.approx(sum(columns) / 2, abs=1e-9)
        assert got.cosine == pytest.approx(float(cosine), abs=1e-6)  # the oracle's products are fp32
        assert found.norm(first) == pytest.approx(float(deltas[0].norm()), rel=1e-6)
        distance = (deltas[0] - deltas[1]).norm() / max(d.norm() for d in deltas)
        assert found.distance(first, second) == pytest.approx(float(distance), rel=1e-5)
    for name, expert in experts.items():
        for layer, factors in expert.layers.items():
            dense = (factors.scaling * factors.B.double()) @ factors.A.double()
            assert found.ranks[name][layer] == torch.linalg.matrix_rank(dense, rtol=1e-8)


def test_edges_of_overlap():
    A, B = torch.eye(4)[:2], torch.eye(3)[:, :2]
    layers = {
        "same": LowRank(torch.tensor([[1.0, 1, 0, 0], [0, 5, 0, 0]]), B, 2.0),  # other rows, one space
        "apart": LowRank(torch.eye(4)[2:], B),
        "half": LowRank(torch.eye(4)[1:3], B),
        "twin": LowRank(torch.eye(4)[[0, 0]], B),  # rank 1 in A
        "zero": LowRank(0 * A, B),
        "wide": LowRank(torch.ones(2, 5), B),
    }
    found = survey({"ref": Adapter({"l": LowRank(A, B)}), **{n: Adapter({"l": layer}) for n, layer in layers.items()}})
    rows = {name: found.overlaps["ref", name].rows for name in layers}
    assert rows == {
        "same": pytest.approx(1),
        "apart": 0,
        "half": 0.5,
        "twin": pytest.approx(1),
        "zero": None,
        "wide": None,
    }
    assert found.ranks["twin"]["l"] == 1
    assert found.ranks["zero"]["l"] == 0
    assert found.overlaps["ref", "zero"].cosine is None
    assert found.overlaps["ref", "wide"].layers == 0
    assert found.overlaps["ref", "wide"].cosine == 0  # no layer in common: nothing of one lies along the other
    assert found.overlaps["ref", "apart"].chance == 0.5
    assert found.distance("ref", "zero") == 1


def test_two_zero_updates_have_no_distance():
    zero = LowRank(torch.zeros(1, 4), torch.zeros(3, 1))
    found = survey({name: Adapter({"l": zero}) for name in "ab"})
    assert found.distance("a", "b") is None


def test_tiny_and_huge_updates_neither_underflow_nor_overflow():
    base = adapters((3,))["t0"]
    scaled = {
        f"{exponent}": Adapter(
            {n: LowRank(f.A.double(), f.B.double() * 10.0**exponent) for n, f in base.layers.items()}
        )
        for exponent in (-100, 0, 30, 60)
    }
    found = survey(scaled)
    assert found.overflowing == {"-100": [], "0": [], "30": [], "60": ["l.0", "l.1"]}
    assert found.overlaps["-100", "30"].cosine == pytest.approx(1)
    assert found.distance("-100", "30") == pytest.approx(1)
    assert math.isfinite(found.norm("30"))


def test_layers_with_equal_rows_are_grouped():
    row, other = {"a": (4, 4)}, {"a": (4, 3)}
    names = [f"model.layers.{i}.q" for i in range(12)]
    table = {name: other if name.endswith((".5.q", ".7.q")) else row for name in [*names, "head", "x2.q"]}
    table = dict(sorted(table.items(), key=lambda item: natural(item[0])))
    assert group(table) == [
        ("head", 1, row),
        ("model.layers.[0-4,6,8-11].q", 10, row),
        ("model.layers.[5,7].q", 2, other),
        ("x2.q", 1, row),
    ]


def test_every_method_has_a_cost():
    assert set(METHODS) <= set(COSTS)


def test_estimates_by_hand():
    experts = list(adapters((2, 3), d_in=1000, d_out=500, layers=("l",)).values())
    found = {e.method: e for e in estimate(experts, Speed())}
    assert set(found) == set(METHODS)
    assert (found["task_arithmetic"].rank, found["task_arithmetic"].disk) == (5, 4 * 5 * 1500)
    assert (found["svd"].rank, found["svd"].disk) == (3, 4 * 3 * 1500)
    # Adapters, the result and the copy that is written, and six fp32 words per stacked float.
    assert found["task_arithmetic"].memory == 4 * (1 + 2 + 6) * 5 * 1500
    dense = COSTS["ties"](Shape(500, 1000, (2, 3)))
    assert (dense.rank, dense.output, dense.working) == (None, 500_000, 8 * 500_000)
    assert all(e.seconds > 0 for e in found.values())
    assert estimate([], Speed()) == []


def test_dense_memory_does_not_grow_with_the_number_of_layers():
    works = [COSTS[name](Shape(64, 64, (4, 4))) for name in COSTS]
    few = adapters((4, 4), d_in=64, d_out=64, layers=("a",)).values()
    many = adapters((4, 4), d_in=64, d_out=64, layers=tuple("abcdefgh")).values()
    stored = 8 * 2 * 4 * 128 * 4
    for method, work in zip(COSTS, works, strict=True):
        if work.rank is None and method in METHODS:
            one, eight = (next(e for e in estimate(list(x), Speed()) if e.method == method) for x in (few, many))
            assert eight.disk == 8 * one.disk
            assert eight.memory - one.memory == stored * 7 // 8  # the adapters themselves


def test_the_machine_is_measured():
    speed = Speed.measure()
    assert min(speed.product, speed.entries, speed.qr) > 1e6
