"""Every entry of the continual fixtures, in fp64 and in fp32, dense and in factors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense
from nscmerge.continual.nufilt_layer import prepare
from nscmerge.continual.nufilt_solve import solve_adam

#: Inputs, and what every method gives after the fourth task.
HERE = Path(__file__).parents[2] / "golden" / "continual"
#: The complete set (every step, NUFILT's intermediate values), where it lies beside the checkout.
COMPLETE = Path(__file__).parents[4] / "shared" / "golden_continual"
LINEAR = ["fc1", "fc2"]
RANKS = {"filter_rank": 6, "adapter_rank": 4, "task_rank": 2}
#: Variant and options by method and the fixture's variant, where they are not the defaults.
OURS = {
    ("ties", "mean"): ("default", {"agg": "mean"}),
    ("wudi", "lr1e-3"): ("default", {"lr": 1e-3}),
    ("nufilt", "default"): ("default", RANKS),
    ("nufilt", "papercode"): ("papercode", RANKS),
    ("nufilt", "filter_only"): ("default", RANKS | {"adapter_rank": 0}),
    ("nufilt", "lr1e-2_200"): ("default", RANKS | {"lr": 1e-2, "steps": 200}),
    ("nufilt", "no_filter"): ("default", RANKS | {"filter": False}),
    ("nufilt", "paper_ranks"): ("default", {}),
    ("nufilt", "least_squares"): ("default", RANKS | {"solver": "least_squares"}),
}
ENTRIES = list(json.loads((HERE / "manifest.json").read_text())["files"].items())
IDS = [file.removesuffix(".safetensors").replace("/expected", "") for file, _ in ENTRIES]
BASE = load_file(HERE / "theta0.safetensors")


def dense_experts(dtype):
    return [
        Adapter(
            dense={
                n: x.to(dtype) - BASE[n].to(dtype) for n, x in load_file(HERE / f"dense/task_{t}.safetensors").items()
            },
            linear=LINEAR,
            name=f"task_{t}",
        )
        for t in range(1, 5)
    ]


def lowrank_experts(dtype):
    """With zero deltas of all that was not adapted: the reference's TIES counts those entries."""
    zeros = {n: torch.zeros_like(x) for n, x in BASE.items() if n.removesuffix(".weight") not in LINEAR}
    experts = []
    for t in range(1, 5):
        file = HERE / f"lowrank/adapter_{t}.safetensors"
        with safe_open(file, "pt") as content:
            scaling = float(content.metadata()["lora_alpha"]) / float(content.metadata()["r"])
        x = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        layers = {n: LowRank(x[f"{n}.lora_A.weight"], x[f"{n}.lora_B.weight"], scaling) for n in LINEAR}
        experts.append(Adapter(layers, dense=zeros, name=f"task_{t}"))
    return experts


def init(variant):
    tensors = load_file(HERE / "nufilt_init.safetensors")
    key = "A0_64" if variant == "paper_ranks" else "A0"
    return [{n: tensors[f"{key}/t{t}/{n}.weight"] for n in LINEAR} for t in (2, 3, 4)]


def settings(file, entry):
    """(method, variant, options) of one entry in our words."""
    method, variant = entry["method"], entry["variant"]
    ours, options = OURS.get((method, variant), (variant, {}))
    if method == "nufilt":
        options = options | {"init": init(variant)}
        if file.startswith("dense"):
            options |= {"layers": LINEAR}
    return method, ours, options


def ours(file, name):
    """Our name of a parameter: a layer's for adapters."""
    module = name.removesuffix(".weight")
    return module if file.startswith("lowrank") and module in LINEAR else name


def last_step(file):
    """Merged deltas after the fourth task."""
    key = file.removesuffix(".safetensors").replace("/expected", "") + "/"
    found = {k.removeprefix(key): x for k, x in load_file(HERE / "last_steps.safetensors").items() if k.startswith(key)}
    assert found
    # Of adapters only what they adapt is in the file; all else stays at the base model.
    return {ours(file, name): found.get(name, x.double()) - x.double() for name, x in BASE.items()}


def every_step(file):
    """Merged deltas after each task."""
    by_step = [{} for _ in range(4)]
    for key, tensor in load_file(COMPLETE / file).items():
        step, _, name = key.partition("/")
        by_step[int(step.removeprefix("step")) - 1][ours(file, name)] = tensor - BASE[name].double()
    return by_step


def states_of(file, entry, dtype):
    method, variant, options = settings(file, entry)
    experts = (dense_experts if file.startswith("dense") else lowrank_experts)(dtype)
    return continual.make(method, variant, **options), list(continual.steps(experts, method, variant, **options))


def deviation(got, want):
    """Largest difference over all steps and names, over the largest value wanted."""
    largest = max(float(x.abs().max()) for step in want for x in step.values())
    pairs = ((step(name), x) for step, by_name in zip(got, want, strict=True) for name, x in by_name.items())
    return max(float((a.double() - b).abs().max()) for a, b in pairs) / largest


def in_float64(states):
    return [lambda name, s=s: dense(s.weight(name)) for s in states]


@pytest.mark.parametrize(("file", "entry"), ENTRIES, ids=IDS)
class TestLastStep:
    def test_in_float64(self, file, entry):
        _, states = states_of(file, entry, torch.float64)
        assert deviation(in_float64(states)[-1:], [last_step(file)]) <= entry["tol_fp64"]

    def test_in_float32(self, file, entry):
        made, states = states_of(file, entry, torch.float32)
        assert deviation([made.update(states[-1]).delta], [last_step(file)]) <= entry["tol_fp32"]


@pytest.mark.skipif(not COMPLETE.is_dir(), reason=f"{COMPLETE} is not here; last steps are tested in any case")
class TestCompleteSet:
    @pytest.mark.parametrize(("file", "entry"), ENTRIES, ids=IDS)
    def test_every_step(self, file, entry):
        _, states = states_of(file, entry, torch.float64)
        assert deviation(in_float64(states), every_step(file)) <= entry["tol_fp64"]
        made, states = states_of(file, entry, torch.float32)
        assert deviation([made.update(s).delta for s in states], every_step(file)) <= entry["tol_fp32"]

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_what_nufilt_does_on_the_way(self, form):
        trace = load_file(COMPLETE / form / "nufilt_trace.safetensors")
        file = f"{form}/expected/nufilt__default.safetensors"
        experts = (dense_experts if form == "dense" else lowrank_experts)(torch.float64)
        _, states = states_of(file, dict(ENTRIES)[file], torch.float64)
        for t, H in zip((2, 3, 4), init("default"), strict=True):
            for module in LINEAR:
                name = module if form == "lowrank" else f"{module}.weight"
                new = experts[t - 1].layers[name] if form == "lowrank" else experts[t - 1].dense[name]
                layer = prepare(states[t - 2].weight(name), new, filter_rank=6, task_rank=2)
                problem = layer.problem
                found = solve_adam(problem, H[module].double(), steps=50, lr=1e-3)
                got = {
                    "proj_prev": problem.Vp @ problem.Vp.T,
                    "proj_task": problem.Vv @ problem.Vv.T,
                    "M": dense(layer.fused(None)),
                    "A": found.H,
                    "B": found.G,
                    "loss_trace": found.losses + problem.outside,
                }
                for key, value in got.items():
                    want = trace[f"t{t}/{module}.weight/{key}"]
                    torch.testing.assert_close(value, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
                log = states[t - 1].absorbed[-1].log[name]
                losses = trace[f"t{t}/{module}.weight/loss_trace"]
                assert log["loss_before"] == pytest.approx(float(losses[0]), rel=1e-9)
                assert log["loss_after"] == pytest.approx(float(losses[-1]), rel=1e-9)
