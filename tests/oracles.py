"""Slow, dense, obvious: what the fast code is compared with. And the toy network of the reference fixtures."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nscmerge.factors import LowRank

GOLDEN = Path(__file__).parent / "golden"
TOY_LAYERS = ("layers.0.attn.q_proj", "layers.1.mlp.up_proj")
TOY_SCALINGS = {"uniform": (1.0, 1.0, 1.0), "scaled": (2.0, 1.0, 0.5), "mixed": (1.0, 1.0, 1.0)}


def toy_experts(group: str) -> dict[str, dict[str, LowRank]]:
    """Return ``{task: {layer: LowRank}}`` of a fixture group, scalings as in its manifest."""
    tensors = load_file(GOLDEN / f"adapters_{group}.safetensors")
    return {
        f"t{k}": {
            layer: LowRank(tensors[f"t{k}.{layer}.lora_A.weight"], tensors[f"t{k}.{layer}.lora_B.weight"], scaling)
            for layer in TOY_LAYERS
        }
        for k, scaling in enumerate(TOY_SCALINGS[group])
    }


class Toy(nn.Module):
    """y = W1' tanh(W0' x), with the fixtures' layer names."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for i, (block, name) in enumerate((("attn", "q_proj"), ("mlp", "up_proj"))):
            weight = golden[f"W.{TOY_LAYERS[i]}"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            child = nn.Module()
            child.add_module(name, linear)
            self.layers[i].add_module(block, child)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in TOY_LAYERS)
        return second(torch.tanh(first(x)))


def toy(group: str, targets: str) -> tuple[Toy, dict[str, dict[str, LowRank]], dict[str, dict[str, Tensor]], dict]:
    """Return model, experts, batch and golden numbers of one ``nsc_toy`` fixture."""
    golden = load_file(GOLDEN / f"{group}__nsc_toy__{targets}.safetensors")
    batch = {task: {"x": golden[f"x.{task}"]} for task in ("t0", "t1", "t2")}
    return Toy(golden), toy_experts(group), batch, golden


def dense_ratio(z: Tensor, A: Tensor) -> Tensor:
    """|z - P z| / |z| with the explicit projector P = pinv(A) A, fp64."""
    A, z = A.double(), z.double()
    return (z - z @ (torch.linalg.pinv(A) @ A).T).norm(dim=-1) / z.norm(dim=-1)
