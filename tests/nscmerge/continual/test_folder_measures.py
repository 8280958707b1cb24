"""What ``show`` says about each step, against dense oracles and against what the methods log themselves."""

import json

import pytest
import torch
from rich.console import Console

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.folder import append_to, load_record, save_state, start_folder
from nscmerge.continual.measures import measure
from nscmerge.continual.show import print_report, report
from nscmerge.continual.surrogates import on_subspaces

SHAPES = {"p": (20, 30), "q": (40, 24)}


def adapter(seed, rank=3, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        A, B = torch.randn(rank, d_in, generator=g).double(), torch.randn(d_out, rank, generator=g).double()
        layers[name] = LowRank(A, scale * B, 0.7)
    return Adapter(layers, "base", name=f"[t{seed}]")


def dense_adapter(expert):
    tensors = {f"{name}.weight": x.dense() for name, x in expert.layers.items()}
    return Adapter(dense=tensors, linear=list(SHAPES), base_model="base", name=expert.name)


def oracle(old, new, merged, p, q):
    """The definitions as they stand, with full projectors."""
    Vv = torch.linalg.svd(new).Vh[: min(q, torch.linalg.matrix_rank(new))].T
    Vp = torch.linalg.svd(old).Vh[: min(p, torch.linalg.matrix_rank(old))].T
    Vm = torch.linalg.svd(merged).Vh[: min(p, torch.linalg.matrix_rank(merged))].T
    return {
        "overlap_before": float(torch.trace(Vp @ Vp.T @ Vv @ Vv.T) / Vv.shape[1]),
        "overlap_after": float(torch.trace(Vm @ Vm.T @ Vv @ Vv.T) / Vv.shape[1]),
        "expected": Vp.shape[1] / old.shape[1],
        "stability": float(torch.linalg.norm((merged - old) @ Vp) ** 2 / torch.linalg.norm(old @ Vp) ** 2),
        "plasticity": float(torch.linalg.norm((merged - new) @ Vv) ** 2 / torch.linalg.norm(new @ Vv) ** 2),
    }


@pytest.mark.parametrize("form", [lambda e: e, dense_adapter], ids=["factors", "dense"])
@pytest.mark.parametrize(
    ("method", "options"), [("task_arithmetic", {"lam": 0.4}), ("opcm", {}), ("wudi", {"lr": 1e-3})]
)
def test_equals_full_projectors(method, options, form):
    experts = [adapter(0, 4), adapter(1, 3)]
    made = continual.make(method, **options)
    first, second = map(form, experts)
    before = made.start(first)
    after = made.append(before, second)
    got = measure(before, second, after)
    for name in SHAPES:
        key = name if first.layers else f"{name}.weight"
        old, merged = (
            w.dense() if isinstance(w, LowRank) else w.double() for w in (before.weight(key), after.weight(key))
        )
        want = oracle(old, experts[1].layers[name].dense(), merged, 128, 8)
        assert {k: got[key][k] for k in want} == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_agrees_with_the_losses_that_nufilt_logs():
    options = {"filter_rank": 3, "task_rank": 2, "adapter_rank": 4, "steps": 40, "lr": 1e-2}
    made, experts = continual.make("nufilt", **options), [adapter(0, 5), adapter(1, 4)]
    before = made.start(experts[0])
    after = made.append(before, experts[1])
    got, log = measure(before, experts[1], after), after.absorbed[1].log
    for name in SHAPES:
        old, new = before.weight(name).dense(), experts[1].layers[name].dense()
        Vp, Vv = torch.linalg.svd(old).Vh[:3].T, torch.linalg.svd(new).Vh[:2].T
        stability = got[name]["stability"] * float(torch.linalg.norm(old @ Vp) ** 2)
        plasticity = got[name]["plasticity"] * float(torch.linalg.norm(new @ Vv) ** 2)
        assert stability == pytest.approx(log[name]["stability_after"], rel=1e-8)
        assert plasticity == pytest.approx(log[name]["plasticity_after"], rel=1e-8)
        assert plasticity < log[name]["plasticity_before"]


def test_agrees_with_the_surrogates_of_one_layer():
    made, experts = continual.make("opcm"), [adapter(0, 5), adapter(1, 4)]
    before = made.start(experts[0])
    after = made.append(before, experts[1])
    got = measure(before, experts[1], after)
    for name in SHAPES:
        old, new = before.weight(name), experts[1].layers[name]
        stability, plasticity = on_subspaces(old, after.weight(name), new)
        # Ranks lie below 128 and 8, so the top vectors hold all of M and of delta.
        assert got[name]["stability"] == pytest.approx(stability / float(old.dense().square().sum()), rel=1e-8)
        assert got[name]["plasticity"] == pytest.approx(plasticity / float(new.dense().square().sum()), rel=1e-8)


def test_hand_cases():
    """A duplicate overlaps wholly; something orthogonal not at all; the naive sum of the two moves nothing."""

    def axis(i, name):
        A = torch.zeros(1, 30, dtype=torch.float64)
        A[0, i] = 1.0
        return Adapter({"p": LowRank(A, torch.ones(20, 1, dtype=torch.float64))}, "base", name=name)

    made = continual.make("task_arithmetic", lam=1.0)
    before = made.start(axis(0, "a"))
    twice, other = axis(0, "b"), axis(7, "c")
    same = measure(before, twice, made.append(before, twice))["p"]
    assert (same["overlap_before"], same["stability"], same["plasticity"]) == pytest.approx((1, 1, 1))
    apart = measure(before, other, made.append(before, other))["p"]
    assert (apart["overlap_before"], apart["stability"], apart["plasticity"]) == pytest.approx((0, 0, 0))
    assert (apart["rank_task"], apart["rank_merged"], apart["expected"]) == (1, 1, 1 / 30)  # one column space
    assert measure(None, axis(0, "a"), before)["p"] == pytest.approx(
        {"rank_task": 1, "rank_merged": 1, "overlap_after": 1, "plasticity": 0}
    )


def test_zero_experts_and_zero_merges_have_no_directions():
    zero = Adapter({n: LowRank(x.A, 0 * x.B) for n, x in adapter(0).layers.items()}, "base", name="zero")
    made = continual.make("weight_average")
    before = made.start(zero)
    assert measure(None, zero, before) == {}
    after = made.append(before, adapter(1))
    line = measure(before, adapter(1), after)["p"]
    assert "stability" not in line
    assert line["plasticity"] == pytest.approx(0.25)  # M_2 = delta / 2
    assert measure(after, Adapter(zero.layers, "base", name="again"), after) == {}


@pytest.fixture
def folder(tmp_path):
    start_folder(tmp_path / "f", continual.make("nufilt", filter_rank=3), adapter(0))
    append_to(tmp_path / "f", adapter(1))
    append_to(tmp_path / "f", adapter(2, scale=0.1))
    return tmp_path / "f"


def test_the_report(folder):
    found = report(folder, layers=True)
    json.dumps(found, allow_nan=False)
    assert (found["method"], found["t"], found["layers"], found["tensors"]) == ("nufilt", 3, 2, 0)
    assert [step["name"] for step in found["steps"]] == ["[t0]", "[t1]", "[t2]"]
    assert found["steps"][0]["stability"] is None
    assert found["steps"][0]["losses"] == {}
    record = load_record(folder)
    for i, step in enumerate(found["steps"][1:], start=1):
        lines = record.measures[i]
        assert step["overlap_before"] == pytest.approx(sum(x["overlap_before"] for x in lines.values()) / 2)
        assert step["rank_merged_max"] == 3 * (i + 1)
        log = record.state.absorbed[i].log
        assert step["losses"]["loss_after"] == pytest.approx(sum(x["loss_after"] for x in log.values()))
        assert step["by_layer"]["p"]["log"] == log["p"]
    assert "by_layer" not in report(folder)["steps"][0]


def test_the_tables(folder, capsys):
    print_report(report(folder, layers=True), Console())
    out = capsys.readouterr().out
    # Names are text, not markup.
    assert all(name in out for name in ("[t0]", "[t1]", "[t2]", "in memory", "overlap before", "loss after"))
    assert "Layers in step 3, '[t2]'" in out
    save_state(continual.make("opcm").start(adapter(0)), folder.parent / "g")
    print_report(report(folder.parent / "g"), Console())
    out = capsys.readouterr().out
    assert "lam = 1" in out
    assert "minimised" not in out
