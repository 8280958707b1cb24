"""Any result can be cut by rank or energy: to the best approximation, with its error in the receipt."""

import json

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError
from nscmerge.methods import METHODS
from nscmerge.methods.kinds import Merged
from nscmerge.spectra import dense_svd, rank_for_energy
from nscmerge.truncation import truncate, truncate_layer
from nscmerge.update import load_update

SHAPES = {"l.0": (9, 12), "l.1": (14, 8)}


def experts(count=3, ranks=(2, 2, 2)):
    generator = torch.Generator().manual_seed(3)
    return [
        Adapter(
            {
                n: LowRank(torch.randn(r, i, generator=generator), torch.randn(o, r, generator=generator), 0.5)
                for n, (o, i) in SHAPES.items()
            },
            "base",
            {"p.weight": torch.randn(3, 3, generator=generator)},
            name=f"t{k}",
        )
        for k, r in zip(range(count), ranks, strict=False)
    ]


def best(matrix, rank):
    """The dense textbook answer in fp64, and its relative error."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float(s[rank:].norm() / s.norm())


def energy_rank(matrix, energy):
    """Counting up, as the definition says."""
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    return next(r for r in range(1, len(squares) + 1) if squares[:r].sum() >= energy * squares.sum())


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33), (1, 9), (5000, 6)])
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_a_dense_matrix_is_cut_as_by_an_svd(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low, error = truncate_layer(matrix, rank, None)
    expected, distance = best(matrix, rank)
    assert low.rank == min(rank, *shape)
    torch.testing.assert_close(low.dense().double(), expected, rtol=1e-5, atol=1e-5)
    assert error == pytest.approx(distance, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(low.A @ low.A.T, torch.eye(low.rank), rtol=0, atol=1e-5)


def test_a_rank_deficient_matrix_keeps_its_own_rank():
    product = experts()[0].layers["l.0"].dense()
    u, s, vh = dense_svd(product)
    assert len(s) == 2
    torch.testing.assert_close(s, torch.linalg.svdvals(product.double())[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close((u * s) @ vh, product.double(), rtol=1e-6, atol=1e-6)
    low, error = truncate_layer(product, 7, None)
    assert low.rank == 2
    assert error < 1e-6


@pytest.mark.parametrize("zero", [torch.zeros(4, 6), LowRank(torch.zeros(2, 6), torch.ones(4, 2))])
def test_zero_stays_zero(zero):
    low, error = truncate_layer(zero, 3, 0.9)
    assert (low.rank, low.d_out, low.d_in) == (0, 4, 6)
    assert not error
    assert not low.dense().any()


def test_energy_by_hand():
    s = torch.tensor([3.0, 2.0, 1.0, 1e-9])
    assert [rank_for_energy(s, e) for e in (9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 2, 2, 3, 4]
    assert rank_for_energy(s[:0], 0.5) == 0


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_energy_keeps_the_smallest_rank_that_is_enough(kind, energy):
    layer = merge(experts(), "task_arithmetic").layers["l.0"]
    matrix = layer.dense()
    low, _ = truncate_layer(layer if kind == "factors" else matrix, None, energy)
    expected = 6 if energy == 1 else energy_rank(matrix, energy)
    assert low.rank == expected
    torch.testing.assert_close(low.dense().double(), best(matrix, expected)[0], rtol=1e-4, atol=1e-5)
    assert truncate_layer(layer, 2, energy)[0].rank == min(2, expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_cut_and_becomes_an_adapter(method, tmp_path):
    full = merge(experts(), method)
    update = merge(experts(), method, rank=2)
    assert update.recipe.options["rank"] == 2
    for name in SHAPES:
        matrix = (merge(experts(), "svd", variant="papercode") if method == "svd" else full).delta(name)
        expected, distance = best(matrix, 2)
        assert isinstance(update.layers[name], LowRank)
        assert update.layers[name].rank == min(2, int(torch.linalg.matrix_rank(matrix)))
        torch.testing.assert_close(update.delta(name).double(), expected, rtol=1e-4, atol=1e-5)
        assert update.recipe.relative_error.get(name, 0) == pytest.approx(distance, rel=1e-4, abs=1e-5)
        for task, weights in full.per_task.items():
            expected, distance = best(weights[name], 2)
            torch.testing.assert_close(update.delta(name, task).double(), expected, rtol=1e-4, atol=1e-5)
            assert update.recipe.relative_error[f"tasks/{task}/{name}"] == pytest.approx(distance, rel=1e-4, abs=1e-5)
    assert torch.equal(update.delta("p.weight"), full.delta("p.weight"))
    for task in full.per_task:
        assert torch.equal(update.delta("p.weight", task), full.delta("p.weight", task))
    folder = update.save(tmp_path / "out")
    assert (folder / "adapter_model.safetensors").is_file()
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["relative_error"] == dict(update.recipe.relative_error)
    assert {line["numerical_rank"] for line in receipt["layers"].values()} <= {1, 2}
    read = load_update(folder)
    for task in (None, *full.per_task):
        for name in (*SHAPES, "p.weight"):
            torch.testing.assert_close(read.delta(name, task), update.delta(name, task), rtol=1e-6, atol=1e-6)


def test_what_need_not_be_cut_has_no_error():
    merged = Merged(experts()[0].layers)
    assert truncate(merged, 5, None).relative_error == {}
    assert {layer.rank for layer in truncate(merged, 5, None).layers.values()} == {2}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number >= 1"),
        ({"rank": True}, "rank is True; expected a whole number"),
        ({"rank": 2.0}, "rank is 2.0; expected a whole number"),
        ({"energy": 0}, r"energy is 0; expected a number in \(0, 1\]"),
        ({"energy": 1.01}, "energy is 1.01; expected a number"),
        ({"energy": float("nan")}, "energy is nan; expected a number"),
        ({"energy": True}, "energy is True; expected a number"),
        ({"energy": "0.9"}, "energy is '0.9'; expected a number"),
    ],
)
@pytest.mark.parametrize("method", ["svd", "task_arithmetic", "ties"])
def test_values_out_of_range_are_refused(method, option, message):
    with pytest.raises(MethodError, match=f"{method}: {message}"):
        merge(experts(), method, **option)
