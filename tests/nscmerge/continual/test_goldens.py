"""Every entry of the continual fixtures, in fp64 and in fp32, dense and in factors."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense

SHARED = Path(os.environ.get("NSCMERGE_GOLDEN", Path(__file__).parents[4] / "shared")) / "golden_continual"
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
if SHARED.is_dir():
    MANIFEST = json.loads((SHARED / "manifest.json").read_text())
    ENTRIES = [(file, entry) for file, entry in MANIFEST["files"].items() if "/expected/" in file]
else:
    MANIFEST, ENTRIES = {}, []
pytestmark = pytest.mark.skipif(not ENTRIES, reason="the continual fixtures (shared/golden_continual) are not here")


def dense_experts(dtype):
    base = load_file(SHARED / "theta0.safetensors")
    return [
        Adapter(
            dense={
                n: x.to(dtype) - base[n].to(dtype) for n, x in load_file(SHARED / f"dense/task_{t}.safetensors").items()
            },
            linear=LINEAR,
            name=f"task_{t}",
        )
        for t in range(1, 5)
    ]


def lowrank_experts(dtype):
    """With zero deltas of all that was not adapted: the reference's TIES counts those entries."""
    base = load_file(SHARED / "theta0.safetensors")
    zeros = {n: torch.zeros_like(x) for n, x in base.items() if n.removesuffix(".weight") not in LINEAR}
    experts = []
    for t in range(1, 5):
        file = SHARED / f"lowrank/adapter_{t}.safetensors"
        with safe_open(file, "pt") as content:
            scaling = float(content.metadata()["lora_alpha"]) / float(content.metadata()["r"])
        x = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        layers = {n: LowRank(x[f"{n}.lora_A.weight"], x[f"{n}.lora_B.weight"], scaling) for n in LINEAR}
        experts.append(Adapter(layers, dense=zeros, name=f"task_{t}"))
    return experts


def init(variant):
    tensors = load_file(SHARED / "nufilt_init.safetensors")
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


def expected(file):
    """Merged deltas by step, then by our names."""
    base = load_file(SHARED / "theta0.safetensors")
    by_step = [{} for _ in range(4)]
    for key, tensor in load_file(SHARED / file).items():
        step, _, name = key.partition("/")
        by_step[int(step.removeprefix("step")) - 1][name] = tensor - base[name].double()
    if file.startswith("lowrank"):
        modules = {f"{name}.weight": name for name in LINEAR}
        return [{modules.get(name, name): x for name, x in step.items()} for step in by_step]
    return by_step


def deviation(got, want):
    largest = max(float(x.abs().max()) for step in want for x in step.values())
    worst = max(
        float((step(name).double() - x).abs().max())
        for step, by in zip(got, want, strict=True)
        for name, x in by.items()
    )
    return worst / largest


@pytest.mark.parametrize(("file", "entry"), ENTRIES, ids=[file.removesuffix(".safetensors") for file, _ in ENTRIES])
class TestGolden:
    def test_in_float64(self, file, entry):
        method, variant, options = settings(file, entry)
        experts = (dense_experts if file.startswith("dense") else lowrank_experts)(torch.float64)
        states = list(continual.steps(experts, method, variant, **options))
        got = [lambda name, s=s: dense(s.weight(name)) for s in states]
        assert deviation(got, expected(file)) <= entry["tol_fp64"]

    def test_in_float32(self, file, entry):
        method, variant, options = settings(file, entry)
        experts = (dense_experts if file.startswith("dense") else lowrank_experts)(torch.float32)
        updates = continual.run(experts, method, variant, **options)
        assert deviation([update.delta for update in updates], expected(file)) <= entry["tol_fp32"]
