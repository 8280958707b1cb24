"""LoRA-LEGO against a plain k-means that keeps its centroids, by hand, and at its edges."""

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import AdapterError, MethodError, ShapeError
from nscmerge.methods.lora_lego import k_means, merge_units

D_OUT, D_IN = 7, 9


def layer(*ranks, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        LowRank(torch.randn(r, D_IN, **draw).to(dtype), torch.randn(D_OUT, r, **draw).to(dtype), 0.5 + 0.7 * k)
        for k, r in enumerate(ranks)
    ]


def adapters(*layers):
    return [Adapter({"l": e, "m": e}, name=name) for name, e in zip("abcdef", layers, strict=False)]


def oracle(experts, start):
    """Section by section, in loops: pool, directions, ten rounds with centroids in full, weighted means, product."""
    units = [(e.scaling**0.5 * e.A[i], e.scaling**0.5 * e.B[:, i]) for e in experts for i in range(e.rank)]
    features = [torch.cat([a / (a.norm() + 1e-8), b / (b.norm() + 1e-8)]) for a, b in units]
    centroids = [features[i].clone() for i in start]
    for _ in range(10):
        labels = [min(range(len(start)), key=lambda c: float(((f - centroids[c]) ** 2).sum())) for f in features]
        for c in range(len(start)):
            if members := [f for f, label in zip(features, labels, strict=True) if label == c]:
                centroids[c] = sum(members) / len(members)
    merged = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for c in range(len(start)):
        if members := [torch.cat(u) for u, label in zip(units, labels, strict=True) if label == c]:
            mean = sum(members) / len(members)
            mean = mean * sum(m.abs().max() for m in members) / len(members) / (mean.abs().max() + 1e-12)
            merged += torch.outer(mean[D_IN:], mean[:D_IN])
    return (max(e.rank for e in experts) / len(start)) ** 0.5 * merged


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "k"), [((4,), 2), ((3, 3), 3), ((1, 4, 3), 4), ((5, 5, 5, 5), 6), ((2, 3), 5)])
def test_equals_plain_k_means(ranks, k, seed):
    experts = layer(*ranks, seed=seed)
    start = torch.randperm(sum(ranks), generator=torch.Generator().manual_seed(seed))[:k]
    merged = merge_units(experts, start, lam=0.3)
    assert merged.rank == k
    torch.testing.assert_close(merged.dense(), 0.3 * oracle(experts, start.tolist()), rtol=1e-10, atol=1e-10)


def test_rounds_matter_and_the_last_moves_nothing():
    # Points on a line, both starts at its left end: the border halves its way to the middle and takes over ten rounds.
    jitter = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    line = (torch.arange(2000) + jitter)[:, None]
    centroids, rounds = line[:2].clone(), []
    for _ in range(11):
        rounds.append(((line - centroids.T) ** 2).argmin(1))
        centroids = torch.stack([line[rounds[-1] == c].mean(0) for c in (0, 1)])
    assert torch.equal(k_means(line, torch.tensor([0, 1])), rounds[9])
    assert len({int(labels.sum()) for labels in rounds}) == 11  # so a round more or less would be seen


def test_ties_go_to_the_lowest_and_empty_clusters_keep_their_centroid():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # Round 1: cluster 0 takes its twin's members and, among equals, [0, 1], which draws its centroid away. Cluster 1 is
    # empty, stays at [1, 0], and takes both twins in round 2. (Had it moved to its members' mean, it would be NaN.)
    assert k_means(features, torch.tensor([0, 1, 2])).tolist() == [1, 1, 2, 0]
    assert k_means(features, torch.tensor([0, 1])).tolist() == [1, 1, 0, 0]
    # Cluster 2, the twin of cluster 1, stays empty to the end.
    assert k_means(features, torch.tensor([2, 1, 0])).tolist() == [1, 1, 0, 0]


def test_by_hand():
    one = LowRank(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0]]), 4.0)  # unit (4, 0 | 8)
    two = LowRank(torch.tensor([[6.0, 0.0]]), torch.tensor([[2.0]]), 1.0)  # unit (6, 0 | 2), the same direction
    # mean (5, 0 | 5) times mean of largest 7 over 5: (7, 0 | 7); r = k = 1
    for start in (0, 1):
        torch.testing.assert_close(merge_units([one, two], torch.tensor([start])).dense(), torch.tensor([[49.0, 0.0]]))
    # k = 2 on parallel units: the second centroid's cluster is empty, and sqrt(r / k) shrinks the first
    both = merge_units([one, two], torch.tensor([0, 1]))
    assert both.rank == 2
    torch.testing.assert_close(both.dense(), torch.tensor([[49.0, 0.0]]) / 2**0.5)


def test_equal_experts_come_back_as_one():
    (one,) = layer(3)
    start = torch.tensor([0, 4, 8])  # unit 0 of the first, 1 of the second, 2 of the third
    torch.testing.assert_close(merge_units([one, one, one], start).dense(), one.dense(), rtol=1e-10, atol=1e-10)
    every = merge_units([one], torch.tensor([2, 0, 1]))  # K = 1, a cluster per unit
    torch.testing.assert_close(every.dense(), one.dense(), rtol=1e-10, atol=1e-10)


def test_zero_units_and_zero_experts_give_no_nan():
    one, two = layer(2, 2)
    dead = LowRank(one.A, torch.cat([one.B[:, :1], torch.zeros(D_OUT, 1)], dim=1).double(), one.scaling)
    zero = LowRank(0 * two.A, 0 * two.B, two.scaling)
    for experts in ([dead, two], [one, zero], [zero, zero]):
        assert bool(torch.isfinite(merge_units(experts, torch.tensor([0, 3])).dense()).all())
    assert not merge_units([zero, zero], torch.tensor([0, 3])).dense().any()


def test_defaults_seeds_and_names():
    experts = adapters(*layer(2, 4, 3, dtype=torch.float32))
    plain = merge(experts, "lora_lego")
    assert {e.rank for e in plain.layers.values()} == {4}  # the largest rank
    assert plain.recipe.seed == 0
    assert torch.equal(plain.delta("l"), merge(experts, "lora_lego", seed=0).delta("l"))
    others = [merge(experts, "lora_lego", seed=seed).delta("l") for seed in range(1, 6)]
    assert any(not torch.equal(plain.delta("l"), other) for other in others)
    assert not torch.equal(plain.delta("l"), plain.delta("m"))  # equal layers, but each draws by its own name
    alone = [Adapter({"l": a.layers["l"]}, name=a.name) for a in experts]
    assert torch.equal(plain.delta("l"), merge(alone, "lora_lego").delta("l"))


def test_a_given_start_replaces_the_seed():
    experts = adapters(*layer(2, 4, 3))
    whole = {name: torch.tensor([8, 0, 3, 5, 1, 2, 4, 6, 7]) for name in "lm"}
    start = {name: perm[:2] for name, perm in whole.items()}
    expected = oracle([a.layers["l"] for a in experts], [8, 0]).float()
    for given in (whole, start):
        for seed in (0, 7):
            update = merge(experts, "lora_lego", clusters=2, init_perm=given, seed=seed)
            torch.testing.assert_close(update.delta("l"), expected, rtol=1e-5, atol=1e-5)


def test_order_of_tasks_matters_for_the_start_alone():
    experts = adapters(*layer(2, 3))
    forth = merge(experts, "lora_lego", clusters=2, init_perm={n: torch.tensor([1, 4]) for n in "lm"})
    back = merge(experts[::-1], "lora_lego", clusters=2, init_perm={n: torch.tensor([4, 2]) for n in "lm"})
    torch.testing.assert_close(forth.delta("l"), back.delta("l"))


def test_whole_tensors_are_averaged():
    experts = [
        Adapter({"l": e}, dense={"p.bias": torch.full((2,), float(k))}, name=str(k))
        for k, e in enumerate(layer(2, 2, 2))
    ]
    assert merge(experts, "lora_lego", lam=0.5).delta("p.bias").tolist() == [0.5, 0.5]


REFUSED = {
    "many": ({"clusters": 10}, r"clusters is 10, but layer 'l' has 9 rank-one units in all; expected .* 1 to 9"),
    "none": ({"clusters": 0}, r"clusters is 0; expected a whole number >= 1"),
    "bool": ({"clusters": True}, r"clusters is True; expected a whole number"),
    "seed": ({"seed": "0"}, r"seed is '0'; expected a whole number"),
    "no_map": ({"init_perm": torch.arange(4)}, r"init_perm is a Tensor; expected \{layer: long tensor\}"),
    "unknown": ({"init_perm": {"n": torch.arange(4)}}, r"init_perm names no layer 'n'.*Known: l, m"),
    "lacking": ({"init_perm": {"l": torch.arange(4)}}, r"lacks layer 'm' \(1 of 2 layers lack it\)"),
    "short": ({"init_perm": dict.fromkeys("lm", torch.arange(3))}, r"'l' is \(3,\) .*at least 4 distinct places"),
    "double": ({"init_perm": dict.fromkeys("lm", torch.zeros(4, dtype=torch.long))}, r"\[0, 0, 0, 0\]; expected"),
    "beyond": ({"init_perm": dict.fromkeys("lm", torch.arange(6, 10))}, r"places from 0 to 8"),
    "float": ({"init_perm": dict.fromkeys("lm", torch.rand(4))}, r"torch.float32 .*expected a torch.long tensor"),
    "list": ({"init_perm": {"l": [0, 1, 2, 3], "m": [0]}}, r"is \[0, 1, 2, 3\]; expected a torch.long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(MethodError, match=message):
        merge(adapters(*layer(2, 4, 3)), "lora_lego", **options)


def test_refuses_what_factors_cannot_do():
    one, two = layer(2, 2)
    with pytest.raises(MethodError, match=r"layer 'l' of 'a', 'b': lora_lego needs scaling >= 0, got -1 of expert 1"):
        merge(adapters(one, LowRank(two.A, two.B, -1.0)), "lora_lego")
    with pytest.raises(AdapterError, match=r"layer 'm': adapter 'b' lacks it, and method 'lora_lego'"):
        merge([Adapter({"l": one, "m": one}, name="a"), Adapter({"l": two}, name="b")], "lora_lego")
    with pytest.raises(ShapeError, match=r"\(7, 9\), \(7, 8\)"):
        merge_units([one, LowRank(two.A[:, :8], two.B)], torch.tensor([0]))
