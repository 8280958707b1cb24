"""Closed-form methods against PEFT's own combinations of adapters, an oracle from outside."""

from importlib import metadata

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from torch import nn

from nscmerge import Adapter, LowRank, merge

# Up to 0.20 every svd path applied the scaling twice.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Version(metadata.version("peft")) < Version("0.21.2"), reason="PEFT >= 0.21.2 is the oracle"),
]
SHAPES = {"first": (9, 12), "second": (7, 9)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (d_out, d_in) in SHAPES.items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def model():
    """Three LoRA adapters in PEFT: scalings 2, 1 and 0.5."""
    torch.manual_seed(0)
    net = None
    for name, alpha in (("x", 8), ("y", 4), ("z", 2)):
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=list(SHAPES), init_lora_weights=False)
        if net is None:
            net = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            net.add_adapter(name, config)
    return net


def layers_of(model, adapter):
    found = {}
    for name in SHAPES:
        module = model.base_model.model.get_submodule(name)
        A, B = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        found[name] = LowRank(A, B, module.scaling[adapter])
    return found


@pytest.mark.parametrize(
    ("method", "combination", "options"),
    [
        ("task_arithmetic", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {}),
        ("svd", "svd", {"svd_rank": 2, "rank": 2}),
    ],
)
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_equals_pefts_combination(model, method, combination, options, lam):
    theirs = {key: value for key, value in options.items() if key.startswith("svd")}
    ours = {key: value for key, value in options.items() if key not in theirs}
    # One weight for all tasks is our lambda, for linear too: there its square root enters both factors.
    model.add_weighted_adapter(["x", "y", "z"], [lam] * 3, "merged", combination_type=combination, **theirs)
    merged = merge([Adapter(layers_of(model, name), name=name) for name in "xyz"], method, lam=lam, **ours)
    for name, expected in layers_of(model, "merged").items():
        torch.testing.assert_close(merged.delta(name), expected.dense(), rtol=1e-4, atol=1e-5)
