"""FR-Merging against the full complex transform, bin by bin, and its experts against their formula."""

import math

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError
from nscmerge.methods.free_merging import filtered, half_spectrum, sparse

SHAPES = {"a.q": (20, 31), "b.o": (33, 24), "c": (6, 7)}
TASKS = "xyz"


def experts(*ranks, whole=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, rank in enumerate(ranks):
        draw = {"generator": generator}
        layers = {
            name: LowRank(torch.randn(rank, d_in, **draw), torch.randn(d_out, rank, **draw), 0.5 + k)
            for name, (d_out, d_in) in SHAPES.items()
        }
        dense = {"p.weight": torch.randn(10, 12, **draw), "p.bias": torch.randn(10, **draw)} if whole else {}
        made.append(Adapter(layers, dense=dense, name=TASKS[k]))
    return made


def deltas(adapters, name):
    return [(a.layers[name].dense() if name in a.layers else a.dense[name]).double() for a in adapters]


def through(delta, weight):
    """Re ifft2(w fft2(delta)) with the whole spectrum and w(distance, min(H, W)) asked bin by bin."""
    if delta.ndim != 2:
        return delta
    height, width = delta.shape
    w = torch.tensor(
        [
            [weight(math.hypot(i - height // 2, j - width // 2), min(height, width)) for j in range(width)]
            for i in range(height)
        ],
        dtype=torch.float64,
    )
    return torch.fft.ifft2(w * torch.fft.fft2(delta.double())).real


def high_pass(ratio=0.70, overlap=True):
    def weight(distance, side):
        return float(distance <= ratio * side + 1e-9) + float(overlap and distance == side // 10)

    return weight


def low_pass(distance, side):
    return float(distance >= max(1, int(0.1 * side)))


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=3e-6 * float(expected.abs().max()))


NAMES = [*SHAPES, "p.weight", "p.bias"]


@pytest.mark.parametrize("ranks", [(3,), (2, 2), (1, 4, 3)])
@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"ratio": 0.3}, {"ratio": 1.0, "overlap": False}])
def test_equals_the_complex_transform(ranks, options):
    adapters = experts(*ranks)
    update = merge(adapters, "free_merging", lam=0.3, **options)
    for name in NAMES:
        close(update.delta(name), 0.3 * sum(through(d, high_pass(**options)) for d in deltas(adapters, name)))


def test_the_overlap_counts_where_it_should():
    plain, once = (merge(experts(2), "free_merging", overlap=overlap) for overlap in (True, False))
    assert not torch.allclose(plain.delta("a.q"), once.delta("a.q"))  # distance 2 exists on a 20 x 31 grid
    assert torch.equal(plain.delta("p.bias"), once.delta("p.bias"))


def test_papercode_is_the_opposite_filter():
    adapters = experts(2, 3)
    update = merge(adapters, "free_merging", variant="papercode", lam=0.3)
    for name in NAMES:
        close(update.delta(name), 0.3 * sum(through(d, low_pass) for d in deltas(adapters, name)))


def test_by_hand_on_pure_frequencies():
    i, j = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    constant = torch.ones(8, 8)
    checkers = (-1.0) ** (i + j)  # the highest frequency, at the centre of the disc: 8 // 10 = 0, so it counts twice
    stripes = ((-1.0) ** i).expand(8, 8)  # bin (4, 0), 4 from the centre, radius 5.6
    for matrix, weight, low in ((constant, 0.0, 1.0), (checkers, 2.0, 0.0), (stripes, 1.0, 1.0)):
        adapter = Adapter({"l": LowRank(torch.eye(8), matrix.clone())})
        torch.testing.assert_close(merge([adapter], "free_merging").delta("l"), weight * matrix, rtol=0, atol=1e-6)
        papercode = merge([adapter], "free_merging", variant="papercode")
        torch.testing.assert_close(papercode.delta("l"), low * matrix, rtol=0, atol=1e-6)


def test_the_radius_reaches_whole_numbers_in_spite_of_rounding():
    assert 0.7 * 90 < 63  # what it is about
    i, j = torch.arange(90.0)[:, None], torch.arange(200.0)[None]
    for distance, kept in ((63, 1.0), (64, 0.0)):  # one wave in the row of the highest frequency, so far from it
        wave = (-1.0) ** i * torch.cos(2 * torch.pi * (100 - distance) * j / 200)
        update = merge([Adapter(dense={"p": wave}, name="x")], "free_merging")
        torch.testing.assert_close(update.delta("p"), kept * wave, rtol=0, atol=1e-4)


SHARES = {"original": (0.9998, 0.317), "papercode": (0.969, 0.992)}  # on 1024 x 1024 and on 1024 x 4096


@pytest.mark.parametrize("variant", SHARES)
def test_share_of_kept_bins(variant):
    options = {"overlap": False} if variant == "original" else {}
    for width, share in zip((1024, 4096), SHARES[variant], strict=True):
        impulse = torch.zeros(1024, width)
        impulse[0, 0] = 1  # every bin is 1, so what comes back of it is the mean weight
        update = merge([Adapter(dense={"p": impulse}, name="x")], "free_merging", variant=variant, **options)
        assert float(update.delta("p")[0, 0]) == pytest.approx(share, abs=6e-4)


def alignment(adapters, name, weight):
    means = [float(through(d, weight).abs().mean()) for d in deltas(adapters, name)]
    return [max(means) / m for m in means]


def test_align_makes_tasks_weigh_the_same_in_every_tensor():
    adapters = experts(1, 4, 3)
    update = merge(adapters, "free_merging", align=True, lam=0.3)
    for name in NAMES:
        factors = alignment(adapters, name, high_pass())
        terms = [f * through(d, high_pass()) for f, d in zip(factors, deltas(adapters, name), strict=True)]
        assert len({round(float(t.abs().mean()), 9) for t in terms}) == 1
        close(update.delta(name), 0.3 * sum(terms))
    one = experts(3)
    close(merge(one, "free_merging", align=True).delta("a.q"), merge(one, "free_merging").delta("a.q"))


@pytest.mark.parametrize("align", [False, True])
def test_experts_add_each_tasks_largest_entries(align):
    adapters, q = experts(1, 4, 3), 0.1
    update = merge(adapters, "free_merging", expert_share=q, align=align, lam=0.3)
    shared = merge(adapters, "free_merging", align=align, lam=0.3)
    for k, adapter in enumerate(adapters):
        whole, kept, entries = [], [], {}
        for name in NAMES:
            delta = deltas(adapters, name)[k]
            factor = alignment(adapters, name, high_pass())[k] if align else 1.0
            whole.append(factor * float(through(delta, high_pass()).abs().mean()))
            entries[name] = torch.zeros_like(delta)
            rows, own = entries[name].reshape(-1, delta.shape[-1]), delta.reshape(-1, delta.shape[-1])
            for target, row in zip(rows, own, strict=True):
                for size in row.abs().sort(descending=True).values[: int(q * len(row))]:
                    target[row.abs() == size] = row[row.abs() == size]
            kept.append(float(entries[name].abs().mean()))
        mu = -math.log10(q) * (sum(kept) / len(kept) / q) / (sum(whole) / len(whole))
        assert update.recipe.extra["expert_scales"][adapter.name] == pytest.approx(mu, rel=1e-5)
        for name in NAMES:
            close(update.delta(name, adapter.name), shared.delta(name).double() + 0.3 * mu * entries[name])
            assert torch.equal(update.delta(name), shared.delta(name))
    assert update.recipe.extra["too_narrow_for_experts"] == ["c"]  # int(0.1 * 7) = 0
    assert not shared.per_task


def test_sparse_keeps_rows_apart():
    rows = torch.tensor([[1.0, -5.0, 2.0, 3.0], [40.0, 30.0, 20.0, -10.0]])
    assert sparse(rows, 0.5).tolist() == [[0.0, -5.0, 0.0, 3.0], [40.0, 30.0, 0.0, 0.0]]
    assert not sparse(rows, 0.2).any()
    assert not sparse(torch.tensor(3.0), 0.5).any()


@pytest.mark.parametrize("options", [{}, {"align": True}, {"expert_share": 0.1}, {"align": True, "expert_share": 0.1}])
def test_zero_updates_and_missing_layers_give_no_nan(options):
    full, other = experts(2, 3, whole=False)
    zero = Adapter({n: LowRank(e.A, 0 * e.B) for n, e in full.layers.items()}, name="y")
    lacking = Adapter({"a.q": other.layers["a.q"]}, name="z")
    update = merge([full, zero, lacking], "free_merging", **options)
    for task in (None, *update.per_task):
        for name in SHAPES:
            assert bool(torch.isfinite(update.delta(name, task)).all())
    close(update.delta("b.o"), through(full.layers["b.o"].dense(), high_pass()))
    if options.get("expert_share"):
        assert update.recipe.extra["expert_scales"]["y"] == 0
        close(update.delta("b.o", "y"), update.delta("b.o"))


def test_align_does_not_blow_up_what_the_filter_removes():
    smooth = Adapter({"l": LowRank(torch.ones(1, 20), torch.ones(20, 1))}, name="x")  # the constant alone, w = 0
    (rough,) = experts(2, whole=False)
    rough = Adapter({"l": LowRank(rough.layers["a.q"].A[:, :20], rough.layers["a.q"].B)}, name="y")
    both, alone = (merge(adapters, "free_merging", align=True) for adapters in ([smooth, rough], [rough]))
    torch.testing.assert_close(both.delta("l"), alone.delta("l"), rtol=1e-5, atol=1e-5)


def test_convolution_tensors_that_are_no_matrix_are_summed():
    kernels = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    adapters = [Adapter(dense={"conv.weight": kernel}, name=str(k)) for k, kernel in enumerate(kernels)]
    for variant in ("original", "papercode"):
        update = merge(adapters, "free_merging", variant=variant)
        torch.testing.assert_close(update.delta("conv.weight"), sum(kernels))


def test_fp32_is_close_to_fp64_on_a_real_width():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 1500, generator=generator)

    def disc(distance, side):
        return (distance <= (0.7 * side) ** 2).float()

    i, j = torch.arange(1024)[:, None] - 512, torch.arange(1500)[None] - 750
    exact = torch.fft.ifft2(torch.fft.fft2(delta.double()) * ((i**2 + j**2) <= (0.7 * 1024) ** 2)).real
    assert float((filtered(delta, half_spectrum(delta.shape, disc)) - exact).abs().max()) <= 1e-6 * float(
        exact.abs().max()
    )


REFUSED = {
    "zero_ratio": ({"ratio": 0}, r"ratio is 0; expected a number in \(0, 1\]"),
    "percent": ({"ratio": 70}, r"ratio is 70; expected"),
    "bool_ratio": ({"ratio": True}, r"ratio is True; expected"),
    "nan": ({"ratio": float("nan")}, r"ratio is nan; expected"),
    "switch": ({"align": 1}, r"align is 1; expected True or False"),
    "overlap": ({"overlap": "no"}, r"overlap is 'no'; expected True or False"),
    "share": ({"expert_share": 1.0}, r"expert_share is 1.0; expected a number in \[0, 1\)"),
    "narrow": (
        {"expert_share": 0.01},
        r"keeps int\(0.01 \* 31\) = 0 entries of the widest row; expected at least 0.032",
    ),
    "low": ({"variant": "papercode", "low_ratio": -0.1}, r"low_ratio is -0.1; expected a number in \[0, 1\]"),
    "other": ({"variant": "papercode", "ratio": 0.7}, r"no option 'ratio'; did you mean 'low_ratio'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(MethodError, match=message):
        merge(experts(2, 2), "free_merging", **options)
