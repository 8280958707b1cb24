"""Closed-form methods against reference programs' outputs and against dense algebra."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError, ShapeError
from nscmerge.methods import METHODS
from nscmerge.methods.dense import dense_mean, dense_sum
from nscmerge.methods.linear import linear
from nscmerge.methods.svd import svd, svd_untruncated
from nscmerge.methods.table import methods_table
from nscmerge.methods.task_arithmetic import task_arithmetic
from nscmerge.methods.weight_average import weight_average
from nscmerge.spectra import numerical_rank, product_svd, relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "closed_form.json").read_text())


def golden(file):
    return load_file(GOLDEN / Path(file).name)


def golden_adapters(group):
    """The reference inputs of one group, as adapters in memory."""
    made = MANIFEST["adapters"]["set_s"]
    dense = golden(made["dense_file"]) if group == "dense" else {}
    entry = made["groups"]["uniform" if group == "dense" else group]
    tensors = golden(entry["file"])
    return [
        Adapter(
            {
                layer: LowRank(tensors[f"{task}.{layer}.lora_A.weight"], tensors[f"{task}.{layer}.lora_B.weight"], s)
                for layer in made["layers"]
            },
            saved={key.removeprefix(f"{task}."): t for key, t in dense.items() if key.startswith(f"{task}.")},
            name=task,
        )
        for task, s in zip(made["tasks"], entry["s"], strict=True)
    ]


#: Method and options of our table by the reference's method name, and variant where it takes an option.
NAMES = {"ta": "task_arithmetic", "svd": "svd", "emr": "emr", "robustmerge": "robust_merge"}
NAMES |= {"ties": "ties", "knots_ties": "knots_ties"}
OPTIONS = {("emr", "paper_rescaler"): {"rescale": "global"}}
OPTIONS |= {("ties", "original_sum"): {"agg": "sum"}, ("ties", "papercode_mean"): {"agg": "mean"}}


@pytest.mark.parametrize("entry", MANIFEST["entries"], ids=lambda e: e["id"])
def test_equals_the_reference_program(entry):
    method = NAMES[entry["method"]]
    variant = "papercode" if entry["role"] == "papercode" else "original"
    options = OPTIONS.get((entry["method"], entry["variant"]), {})
    base = golden("dense.safetensors")
    base = {key.removeprefix("base."): t for key, t in base.items() if key.startswith("base.")}
    merged = merge(golden_adapters(entry["group"]), method, variant=variant, base=base, **options)
    expected = {k: t for k, t in golden(entry["file"]).items() if not k.startswith(("lora_", "U.", "S."))}
    assert expected
    for key, tensor in expected.items():
        if (kind := key.split(".")[0]) == "rescalers":
            got = torch.tensor(list(merged.recipe.extra["rescalers"].values()))
        else:
            # EMR's keys: unified.<name> for all tasks, task.<task>.<name> and mask.<task>.<name> for one.
            task, name = key.split(".", 2)[1:] if kind in ("task", "mask") else (None, key.removeprefix("unified."))
            name = name if name in merged.dense else name.removesuffix(".weight")
            got = merged.delta(name, task)
            if kind == "mask":
                assert torch.equal(got != 0, tensor.bool()), key
                continue
            # RobustMerge's projector is the whole weight, not its delta.
            got = got + base[name] if method == "robust_merge" and name in base else got
        assert (got - tensor).abs().max() <= entry["rel_tol"] * tensor.abs().max(), key


def layer(*ranks, seed=0, d_in=9, d_out=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        LowRank(torch.randn(r, d_in, **draw).to(dtype), torch.randn(d_out, r, **draw).to(dtype), 0.5 + 0.7 * k)
        for k, r in enumerate(ranks)
    ]


RANKS = [(2,), (2, 2), (1, 4, 3), (5, 5, 5)]  # one task, equal, unequal, together above min(d_out, d_in)


@pytest.mark.parametrize("ranks", RANKS)
def test_sums_equal_dense_sums(ranks):
    experts = layer(*ranks)
    total = sum(e.scaling * e.B @ e.A for e in experts)
    merged = task_arithmetic(experts, lam=0.3)
    assert merged.rank == sum(ranks)
    torch.testing.assert_close(merged.dense(), 0.3 * total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd_untruncated(experts, lam=0.3).dense(), 0.3 * total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight_average(experts).dense(), total / len(ranks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rank", [None, 1, 3, 100])
def test_svd_is_the_best_approximation(ranks, rank):
    experts = layer(*ranks)
    u, s, vh = torch.linalg.svd(sum(e.scaling * e.B @ e.A for e in experts))
    keep = min(rank or max(ranks), 7, sum(ranks))
    merged = svd(experts, lam=2.0, rank=rank)
    assert merged.rank == keep
    torch.testing.assert_close(merged.dense(), 2 * (u[:, :keep] * s[:keep]) @ vh[:keep], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_svd_keeps_the_smallest_rank_that_holds_the_energy(energy):
    experts = layer(2, 4)
    s = torch.linalg.svdvals(sum(e.scaling * e.B @ e.A for e in experts))[:6].square().tolist()
    keep = next(r for r in range(1, 7) if sum(s[:r]) >= energy * sum(s) * (1 - 1e-12))
    assert svd(experts, energy=energy).rank == keep
    assert svd(experts, energy=energy, rank=2).rank == min(2, keep)
    assert svd(experts, energy=energy, rank=100).rank == keep


def test_svd_is_capped_at_the_numerical_rank():
    (expert,) = layer(2)
    assert svd([expert, expert, expert], rank=6).rank == 2
    opposite = LowRank(expert.A, -expert.B, expert.scaling)
    nothing = svd([expert, opposite])
    torch.testing.assert_close(nothing.dense(), torch.zeros(7, 9, dtype=torch.float64), rtol=0, atol=1e-14)


def test_linear_adds_factors():
    experts = layer(3, 3)
    a = sum(e.scaling**0.5 * e.A for e in experts)
    b = sum(e.scaling**0.5 * e.B for e in experts)
    merged = linear(experts, lam=0.7)
    assert merged.rank == 3
    torch.testing.assert_close(merged.dense(), 0.7 * b @ a, rtol=1e-12, atol=1e-12)


def test_linear_by_hand():
    ones = LowRank(torch.ones(1, 2), torch.ones(1, 1), 4.0)
    assert linear([ones, ones]).dense().tolist() == [[16.0, 16.0]]  # (2 + 2)(2 + 2): cross terms included
    assert task_arithmetic([ones, ones]).dense().tolist() == [[8.0, 8.0]]


@pytest.mark.parametrize("function", [task_arithmetic, weight_average, linear, svd])
def test_half_precision_is_computed_and_returned_in_fp32(function):
    half = layer(2, 2, dtype=torch.bfloat16)
    merged = function(half)
    assert (merged.A.dtype, merged.B.dtype) == (torch.float32, torch.float32)
    wide = function([LowRank(e.A.float(), e.B.float(), e.scaling) for e in half])
    assert torch.equal(merged.dense(), wide.dense())


@pytest.mark.parametrize("function", [task_arithmetic, weight_average, linear, svd])
def test_says_which_shapes_differ(function):
    with pytest.raises(ShapeError, match=r"\(7, 9\), \(7, 8\).*same base model"):
        function([*layer(2), *layer(2, d_in=8)])
    with pytest.raises(ShapeError, match="no adapter has"):
        function([])


def test_options_out_of_range():
    with pytest.raises(ShapeError, match=r"ranks \[2, 3\]; use task_arithmetic or svd"):
        linear(layer(2, 3))
    (expert,) = layer(2)
    with pytest.raises(MethodError, match=r"scaling >= 0, got -1 of expert 1"):
        linear([expert, LowRank(expert.A, expert.B, -1.0)])
    for rank in (0, 1.5, True, "4"):
        with pytest.raises(MethodError, match="expected a whole number >= 1"):
            svd([expert], rank=rank)
    for energy in (0, -0.5, 1.5, True, "1", float("nan")):
        with pytest.raises(MethodError, match=r"energy is .*expected a number in \(0, 1\]"):
            svd([expert], energy=energy)


def test_dense_rules():
    deltas = [torch.ones(2, dtype=torch.bfloat16), torch.tensor([3.0, 0.0])]
    assert dense_sum(deltas, lam=0.5).tolist() == [2.0, 0.5]
    assert dense_mean(deltas).tolist() == [2.0, 0.5]
    assert dense_mean(deltas).dtype == torch.float32


def test_spectra_equal_dense_algebra():
    (a,), (b,) = layer(3, seed=1), layer(2, seed=2)
    u, s, vh = product_svd(a)
    torch.testing.assert_close((u * s) @ vh, a.dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(a.dense())[:3], rtol=1e-12, atol=1e-12)
    expected = torch.linalg.matrix_norm(a.dense() - b.dense()) / torch.linalg.matrix_norm(b.dense())
    assert relative_error(a, b) == pytest.approx(float(expected), rel=1e-12)
    assert numerical_rank(LowRank(torch.cat([a.A, a.A]), torch.cat([a.B, a.B], dim=1))) == 3
    zero = LowRank(torch.zeros(2, 9), torch.zeros(7, 2))
    empty = LowRank(torch.zeros(0, 9), torch.zeros(7, 0))
    assert (numerical_rank(zero), numerical_rank(empty), relative_error(zero, zero)) == (0, 0, 0.0)


def test_every_method_states_options_and_source():
    for name, method in METHODS.items():
        assert method.original.__name__ == name
        for variant, function in method.variants.items():
            assert method.options(variant)["lam"] == 1.0
            assert "Source: " in function.__doc__
    assert methods_table().row_count == sum(len(m.variants) for m in METHODS.values())
