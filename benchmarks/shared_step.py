"""One NSC step on twenty tasks with shared batches and with a pass per task, on the same images.

Random weights of the stand-in's size and random images in its four pools (4, 4, 1 and 11 tasks): what a step costs does
not depend on what was learned. Both ways give the same losses and the same gradient, which is checked.

    python benchmarks/shared_step.py --batch 16 --threads 2
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor

from nscmerge import Adapter, LowRank, MergeModule
from nscmerge.batching import TaskKey
from nscmerge.objectives import NSC
from nscmerge.split_qkv import split_qkv

#: Tasks and image size of each pool.
POOLS = {"nyud": (4, (112, 144)), "pascal": (4, (128, 128)), "parts": (1, (128, 128)), "tax": (11, (128, 128))}


def main(batch: int = 16, rank: int = 8, repeats: int = 5, threads: int = 2, device: str = "cpu") -> None:
    """Time both ways in turn and print medians.

    Args:
        batch: Images per task.
        rank: Of the adapters.
        repeats: Timed rounds.
        threads: CPU threads.
        device: Where.

    Raises:
        SystemExit: The two ways disagree.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = split_qkv(
        timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=128, patch_size=8, embed_dim=128, depth=8, num_heads=4,
            dynamic_img_size=True,
        )
    ).requires_grad_(False)  # fmt: skip
    names = [f"{pool}_{i}" for pool, (count, _) in POOLS.items() for i in range(count)]
    linears = {n: m for n, m in model.named_modules() if n.endswith(("qkv.q", "qkv.k", "qkv.v", "attn.proj"))}
    experts = {
        name: Adapter(
            {
                n: LowRank(torch.randn(rank, m.in_features), 0.02 * torch.randn(m.out_features, rank))
                for n, m in linears.items()
            }
        )
        for name in names
    }
    module = MergeModule(model, experts, objective=NSC(projections=["attn.proj"])).to(device)
    module.configure_model()
    module.to(device)
    images = {pool: torch.randn(batch, 3, *size, device=device) for pool, (_, size) in POOLS.items()}
    shared: dict[TaskKey, Any] = {
        tuple(n for n in names if n.startswith(f"{pool}_")): {"x": x} for pool, x in images.items()
    }
    apart: dict[TaskKey, Any] = {name: {"x": images[name.partition("_")[0]]} for name in names}
    found = {name: step(module, given) for name, given in (("shared", shared), ("apart", apart))}
    gap = max(
        float((found["shared"][0] - found["apart"][0]).abs().max()),
        float((found["shared"][1] - found["apart"][1]).abs().max()),
    )
    if gap > 1e-6:
        raise SystemExit(f"losses or gradients differ by {gap:.1e}: the figures below would compare different things.")
    seconds: dict[str, list[float]] = {"shared": [], "apart": []}
    for _ in range(repeats):
        for name, given in (("shared", shared), ("apart", apart)):
            start = time.perf_counter()
            step(module, given)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{len(names)} tasks, {batch} images each, {threads} threads, {device}; largest difference {gap:.1e}")
    print(f"shared: {median['shared']:.2f} s, {len(POOLS) * batch} images through the model")
    print(f"a pass per task: {median['apart']:.2f} s, {len(names) * batch} images")
    print(f"ratio: {median['apart'] / median['shared']:.1f}")


def step(module: MergeModule, batch: dict[TaskKey, Any]) -> tuple[Tensor, Tensor]:
    """Return losses (T,) and gradients (L, T) of one step."""
    module.coefficients.zero_grad()
    losses = module._losses(batch)
    stacked = torch.stack([losses[task] for task in module.tasks])
    module.objective.total(list(stacked)).backward()
    gradient = [torch.zeros_like(lam) if lam.grad is None else lam.grad.clone() for lam in module.coefficients.lam]
    return stacked.detach(), torch.stack(gradient)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
