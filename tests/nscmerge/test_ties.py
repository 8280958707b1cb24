"""TIES and DARE-TIES, streamed, against whole vectors at once and against hand-made cases."""

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError, ShapeError
from nscmerge.lazy import Lazy
from nscmerge.methods.ties_steps import (
    Tally,
    disjoint_merge,
    drop_entries,
    elect_by_signs,
    elect_by_values,
    trim_at,
    trim_share,
)
from nscmerge.stack import Stack
from tests import ties_oracle as oracle
from tests.fakes.unequal import RANKS, SHAPES, adapters, agrees, tensors


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("density", [1e-9, 0.05, 0.2, 0.5, 0.999, 1.0, 1])
@pytest.mark.parametrize("agg", ["mean", "sum"])
class TestTiesEqualsTheOracle:
    def test_original(self, ranks, density, agg):
        experts = adapters(*ranks)
        update = merge(experts, "ties", density=density, agg=agg, lam=0.7)
        agrees(update, oracle.ties([tensors(e) for e in experts], density, agg), lam=0.7)

    def test_papercode(self, ranks, density, agg):
        experts = adapters(*ranks)
        update = merge(experts, "ties", variant="papercode", density=density, agg=agg, lam=-0.7)
        agrees(update, oracle.ties_papercode([tensors(e) for e in experts], density, agg), lam=-0.7)


def test_how_many_entries_are_kept():
    (alone,) = adapters(3)
    total = sum(t.numel() for t in tensors(alone).values())
    for density in (0.2, 0.5, 0.01):
        kept = merge([alone], "ties", density=density)
        assert sum(int((kept.delta(n) != 0).sum()) for n in tensors(alone)) == int(density * total) + 1
        kept = merge([alone], "ties", variant="papercode", density=density)
        for name, tensor in tensors(alone).items():
            assert int((kept.delta(name) != 0).sum()) == max(1, round(density * tensor.numel()))


def test_equal_experts_give_the_trimmed_update():
    (one,) = adapters(3)
    for variant in ("original", "papercode"):
        alone = merge([one], "ties", variant=variant)
        for agg, factor in (("mean", 1), ("sum", 3)):
            three = merge({k: one for k in "xyz"}, "ties", variant=variant, agg=agg)
            agrees(three, {n: alone.delta(n) for n in tensors(one)}, lam=factor)


def tally(*rows):
    return Tally.of(torch.tensor(row) for row in rows)


def test_zero_sums_follow_the_majority_and_minus_if_there_is_none():
    rows = [[1.0, 2.0, 3.0, 0.0], [-1.0, 1.0, -3.0, 0.0]]
    assert elect_by_values(tally(*rows), lambda: 1).tolist() == [True, True, True, False]
    assert elect_by_values(tally(*rows), lambda: -1).tolist() == [False, True, False, False]
    assert elect_by_values(tally(*rows), lambda: 0).tolist() == [False, True, False, False]
    assert elect_by_signs(tally(*rows)).tolist() == [True, True, True, True]

    def whole(first, second, method="ties", **options):
        experts = [Adapter(dense={"w": torch.tensor(v)}, name=n) for n, v in (("a", first), ("b", second))]
        return merge(experts, method, density=1.0, **options).delta("w").tolist()

    # One entry of two agrees on +, so the tied one follows; then on -; then nothing agrees: as the reference, minus.
    assert whole([1.0, 2.0], [-1.0, 1.0]) == [1.0, 1.5]
    assert whole([1.0, -2.0], [-1.0, -1.0]) == [-1.0, -1.5]
    assert whole([1.0, -2.0], [-1.0, 2.0]) == [-1.0, -2.0]
    assert whole([1.0, -2.0], [-1.0, -1.0], variant="papercode") == [1.0, -3.0]


def test_the_majority_is_counted_over_layers_and_whole_tensors():
    one = torch.ones(1, 1)
    a = Adapter({"l": LowRank(one, one)}, dense={"w": torch.tensor([-1.0, -1.0])}, name="a")
    b = Adapter({"l": LowRank(one, -one)}, dense={"w": torch.tensor([-1.0, -1.0])}, name="b")
    assert merge([a, b], "ties", density=1.0).delta("l").tolist() == [[-1.0]]
    flipped = [Adapter(e.layers, dense={"w": -e.dense["w"]}, name=e.name) for e in (a, b)]
    assert merge(flipped, "ties", density=1.0).delta("l").tolist() == [[1.0]]


def test_steps_by_hand():
    v = torch.tensor([[3.0, -1.0], [1.0, -2.0]])
    assert trim_at(v, 2.0).tolist() == [[3.0, 0.0], [0.0, -2.0]]
    assert torch.equal(trim_at(v, 0.0), v)
    assert trim_share(v, 0.75).tolist() == [[3.0, -1.0], [0.0, -2.0]]  # of two ones the first
    assert trim_share(v, 0.1).tolist() == [[3.0, 0.0], [0.0, 0.0]]  # one at least
    assert trim_share(v, 0.625).tolist() == [[3.0, 0.0], [0.0, -2.0]]  # round(2.5) is 2
    assert drop_entries(v, v > 0, 0.5).tolist() == [[6.0, 0.0], [2.0, 0.0]]
    sums = tally([1.0, -4.0, 0.0], [3.0, 1.0, 0.0])
    up = elect_by_values(sums, lambda: 1)
    assert disjoint_merge(sums, up, "mean").tolist() == [2.0, -4.0, 0.0]
    assert disjoint_merge(sums, up, "sum").tolist() == [4.0, -4.0, 0.0]
    with pytest.raises(ShapeError, match="no task's tensor"):
        Tally.of([])


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("variant", ["original", "papercode"])
def test_zero_updates_merge_to_zero(method, variant):
    zero = Adapter({n: LowRank(torch.zeros(2, i), torch.zeros(o, 2)) for n, (o, i) in SHAPES.items()}, name="z")
    update = merge([zero], method, variant=variant)
    assert all(torch.equal(update.delta(n), torch.zeros(s)) for n, s in SHAPES.items())
    mixed = merge([zero, *adapters(2)], method, variant=variant)
    assert all(bool(mixed.delta(n).isfinite().all()) for n in SHAPES)


def test_a_layer_is_computed_only_when_asked_for(monkeypatch):
    asked = []
    plain = Stack.deltas
    monkeypatch.setattr(Stack, "deltas", lambda stack, name: asked.append(name) or plain(stack, name))
    update = merge(adapters(2, 3), "ties")
    assert isinstance(update.layers, Lazy)
    assert len(asked) == 2 * 5  # two passes over three layers and two whole tensors
    asked.clear()
    first, again = update.delta("blocks.2.q"), update.layers["blocks.2.q"]
    assert asked == ["blocks.2.q"] * 2
    assert torch.equal(first, again)


def test_thresholds_are_in_the_receipt():
    experts = adapters(2, 3)
    report = merge(experts, "ties").recipe.extra
    for e in experts:
        magnitudes = oracle.flat(tensors(e)).abs().sort().values
        assert report["thresholds"][e.name] == float(magnitudes[len(magnitudes) - int(0.2 * len(magnitudes)) - 1])


REFUSED = {
    "density_0": ("ties", {"density": 0}, r"ties: density is 0; expected a number in \(0, 1\]"),
    "density_percent": ("dare_ties", {"density": 20}, r"density is 20; expected a number in \(0, 1\]"),
    "density_bool": ("knots_ties", {"density": True}, "density is True"),
    "density_text": ("knots_dare_ties", {"density": "0.2"}, "density is '0.2'"),
    "density_nan": ("ties", {"density": float("nan")}, "density is nan"),
    "agg": ("ties", {"agg": "max"}, r"agg is 'max'.*'mean', 'sum'"),
    "drop_1": ("dare_ties", {"drop": 1}, r"dare_ties: drop is 1; expected a number in \[0, 1\)"),
    "drop_negative": ("knots_dare_ties", {"drop": -0.1}, r"drop is -0.1; expected a number in \[0, 1\)"),
    "drop_bool": ("dare_ties", {"drop": False}, "drop is False"),
    "seed": ("dare_ties", {"seed": 1.5}, "seed is 1.5; expected a whole number"),
    "unknown": ("ties", {"drop": 0.5}, "no option 'drop'"),
    "masks_list": ("dare_ties", {"keep_masks": []}, "keep_masks is a list; expected a mapping by task name"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("variant", ["original", "papercode"])
def test_options_out_of_range(case, variant):
    method, options, message = REFUSED[case]
    with pytest.raises(MethodError, match=message):
        merge(adapters(2, 3), method, variant=variant, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("election", "up"), [("total", lambda t: elect_by_values(t, lambda: 1)), ("frequency", elect_by_signs)]
)
def test_equals_peft_on_one_tensor(election, up):
    """PEFT trims each tensor to int(density n) entries, where 200 of 1000 is ours too, and takes + for a zero sum."""
    peft_ties = pytest.importorskip("peft.utils.merge_utils").ties
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(25, 40, generator=generator) for _ in range(4)]
    expected = peft_ties(deltas, torch.ones(4), 0.2, election)
    sums = Tally.of(trim_share(d, 0.2) for d in deltas)
    torch.testing.assert_close(disjoint_merge(sums, up(sums), "mean"), expected)
