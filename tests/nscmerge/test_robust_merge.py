"""RobustMerge against a dense oracle in loops, by hand, and at its edges."""

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import AdapterError, MethodError, ShapeError
from nscmerge.methods.robust_merge import robust_merge, robust_merge_per_task, trim

D_OUT, D_IN = 7, 9


def layer(*ranks, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        LowRank(torch.randn(r, D_IN, **draw).to(dtype), torch.randn(D_OUT, r, **draw).to(dtype), 0.5 + 0.7 * k)
        for k, r in enumerate(ranks)
    ]


def cut(factor, drop):
    """Keep what is not below the drop-th smallest magnitude, by sorting."""
    ordered = sorted(factor.abs().flatten().tolist())
    least = ordered[drop - 1] if drop else 0.0
    return torch.where(factor.abs() >= least, factor, 0.0)


def oracle(experts, drop_a, drop_b):
    """The text of the method, one row scale at a time."""
    rank = experts[0].rank
    A = [e.scaling**0.5 * e.A for e in experts]
    B = [e.scaling**0.5 * e.B for e in experts]
    At, Bt = [cut(a, drop_a) for a in A], [cut(b, drop_b) for b in B]
    S = []
    for a, at in zip(A, At, strict=True):
        rows = [
            float(a[i].abs().sum() / at[i].abs().sum()) if float(at[i].abs().sum()) else float("inf")
            for i in range(rank)
        ]
        largest = max(v for v in rows if v < float("inf"))
        rows = [min(v, largest) for v in rows]
        low = sorted(rows)[int(0.8 * rank)]
        S.append([max(v, low) for v in rows])
    total = [sum(s[i] for s in S) for i in range(rank)]
    left = sum(2 * b @ torch.diag(torch.tensor(s, dtype=b.dtype)) for b, s in zip(Bt, S, strict=True))
    left = left @ torch.diag(1 / torch.tensor(total, dtype=left.dtype))
    return left @ sum(2 * a for a in At)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [(3,), (4, 4), (6, 6, 6), (8, 8, 8, 8)])
def test_equals_the_oracle(ranks, seed):
    experts, rank = layer(*ranks, seed=seed), ranks[0]
    merged = robust_merge(experts, lam=0.3)
    assert merged.rank == rank
    expected = 0.3 * oracle(experts, int(0.8 * rank * D_IN), int(0.8 * rank * D_OUT))
    torch.testing.assert_close(merged.dense(), expected, rtol=1e-10, atol=1e-10)
    half = robust_merge(experts, density=0.5).dense()
    torch.testing.assert_close(half, oracle(experts, rank * D_IN // 2, rank * D_OUT // 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [(3,), (4, 4), (6, 6, 6)])
def test_papercode_sums_products_task_by_task(ranks):
    experts, rank = layer(*ranks), ranks[0]
    # The code's own 1 - 0.8 lies below 0.2, so that of 45 entries it drops to the 8th, not the 9th.
    drops = [int((1 - 0.8) * rank * width) for width in (D_IN, D_OUT)]
    A = [e.scaling**0.5 * e.A for e in experts]
    B = [e.scaling**0.5 * e.B for e in experts]
    At, Bt = [cut(a, drops[0]) for a in A], [cut(b, drops[1]) for b in B]
    S = [a.abs().sum(1) / (at.abs().sum(1) + 1e-6) for a, at in zip(A, At, strict=True)]
    total = sum(S) + 1e-6
    expected = sum(2 * b @ torch.diag(s / total) @ a for a, b, s in zip(At, Bt, S, strict=True))
    merged = robust_merge_per_task(experts, lam=0.3)
    assert merged.rank == sum(ranks)
    torch.testing.assert_close(merged.dense(), 0.3 * expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [5, 10, 45, 100, 101, 36 * 4, 4096 * 16])
def test_counts_of_kept_entries(n):
    factor = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()[None] + 1
    assert int((trim(factor, 0.2) != 0).sum()) == n - int(0.8 * n) + 1
    assert torch.equal(trim(factor, 1.0), factor)
    assert int((trim(factor, 1e-9) != 0).sum()) == 2  # n - (n - 1) + 1


def test_equal_magnitudes_are_kept_together():
    factor = torch.tensor([[1.0, -2.0, 2.0, -2.0, 3.0]])
    assert trim(factor, 0.6).tolist() == [[0.0, -2.0, 2.0, -2.0, 3.0]]
    assert trim(torch.tensor([[5.0]]), 0.2).tolist() == [[5.0]]  # int(0.8) = 0: nothing to cut


def test_by_hand():
    # Rank 1, 5 entries each: int(0.8 * 5) = 4, so the two largest stay. S = 15/9 and 10/8.
    one = LowRank(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[1.0], [0.0], [0.0], [-3.0], [2.0]]))
    two = LowRank(torch.tensor([[6.0, -2.0, 1.0, 1.0, 0.0]]), torch.tensor([[0.0], [4.0], [0.0], [0.0], [1.0]]))
    s, t = 15 / 9, 10 / 8
    a = 2 * torch.tensor([6.0, -2.0, 0.0, 4.0, 5.0])
    b = 2 * (s * torch.tensor([0.0, 0.0, 0.0, -3.0, 2.0]) + t * torch.tensor([0.0, 4.0, 0.0, 0.0, 1.0])) / (s + t)
    torch.testing.assert_close(robust_merge([one, two]).dense(), torch.outer(b, a))


def test_one_expert_is_four_times_its_trimmed_factors():
    (one,) = layer(4)
    expected = 4 * one.scaling * cut(one.B, int(0.8 * 28)) @ cut(one.A, int(0.8 * 36))
    for count in (1, 3):  # equal experts: S cancels, and K tasks add K-fold on the A side alone
        torch.testing.assert_close(robust_merge([one] * count).dense(), count * expected, rtol=1e-10, atol=1e-10)


def test_a_row_that_the_trim_empties_takes_the_largest_scale():
    one, two = layer(6, 6)
    A = one.A.clone()
    A[2] *= 1e-3  # nothing of it is among the largest 20 %
    A[3] = 0
    experts = [LowRank(A, one.B, one.scaling), two]
    assert not trim(A, 0.2)[2].any()
    merged = robust_merge(experts).dense()
    assert bool(torch.isfinite(merged).all())
    torch.testing.assert_close(merged, oracle(experts, int(0.8 * 54), int(0.8 * 42)), rtol=1e-10, atol=1e-10)


def test_zero_experts_give_no_nan():
    one, two = layer(3, 3)
    empty = LowRank(0 * two.A, 0 * two.B, two.scaling)
    unscaled = LowRank(two.A, two.B, 0.0)
    for function in (robust_merge, robust_merge_per_task):
        for experts in ([one, empty], [one, unscaled], [empty, empty]):
            assert bool(torch.isfinite(function(experts).dense()).all())
        assert not function([empty, empty]).dense().any()


def test_whole_tensors_are_averaged_and_half_precision_is_computed_in_fp32():
    experts = [
        Adapter({"l": e}, dense={"p.bias": torch.full((2,), float(k))}, name=str(k))
        for k, e in enumerate(layer(2, 2, 2, dtype=torch.bfloat16))
    ]
    for variant in ("original", "papercode"):
        update = merge(experts, "robust_merge", variant=variant, lam=0.5)
        assert update.delta("p.bias").tolist() == [0.5, 0.5]
        assert update.layers["l"].A.dtype == torch.float32


def test_options_and_ranks_are_refused_by_name():
    experts = [Adapter({"l": e}, name=name) for name, e in zip("ab", layer(2, 3), strict=True)]
    with pytest.raises(ShapeError, match=r"layer 'l' of 'a', 'b': robust_merge adds factors of one rank.*\[2, 3\]"):
        merge(experts, "robust_merge")
    with pytest.raises(AdapterError, match=r"adapter 'b' lacks it"):
        merge([Adapter({"l": e, n: e}, name=n) for n, e in zip("ab", layer(2, 2), strict=True)], "robust_merge")
    (one,) = layer(2)
    for function in (robust_merge, robust_merge_per_task):
        for density in (0, 1.5, -0.2, float("nan"), True, "0.2"):
            with pytest.raises(MethodError, match=r"density is .*; expected a number in \(0, 1\]"):
                function([one], density=density)
        with pytest.raises(MethodError, match=r"scaling >= 0, got -1 of expert 0"):
            function([LowRank(one.A, one.B, -1.0)])
        with pytest.raises(ShapeError, match=r"\(7, 9\), \(7, 8\)"):
            function([one, LowRank(one.A[:, :8], one.B)])
