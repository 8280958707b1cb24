r"""One learning step of NSC, three ways, side by side in one run on a LLaMA-shaped random model.

(a) ours: one fused batch of all tasks, forward pass stopped at the last target layer, gradient to lambda alone;
(b) the papers' Algorithm 1: one pass per task through the whole model, hooks on the target layers, Gram inverse;
(c) the floor: forward and backward of the frozen base, no adapters, same fused batch, stopped at the same layer.

Times are medians over alternating repeats; ratios are what counts. (a) and (b) must give the same loss and gradient.

    python benchmarks/learning_step.py
    python benchmarks/learning_step.py --sizes.layers 32 --sizes.hidden 4096 --sizes.intermediate 14336 \
        --sizes.heads 32 --sizes.vocabulary 128256 --sizes.device cuda --sizes.dtype bfloat16
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.factors import LowRank
from nscmerge.merged_linear import MergedLinear, MergedModel, attach
from nscmerge.objectives import NSC
from nscmerge.surgery import replace_module

WAYS = ("a", "b", "c")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the batch. The head's share of the weights is that of LLaMA-3-8B (about 6 %)."""

    layers: int = 8
    hidden: int = 128
    intermediate: int = 344
    heads: int = 8
    vocabulary: int = 1024
    tasks: int = 6
    batch: int = 2
    tokens: int = 48
    rank: int = 8
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class Setup:
    """Everything that the three ways share."""

    base: LlamaForCausalLM
    merged: MergedModel
    objective: NSC
    coefficients: Coefficients
    experts: dict[str, dict[str, LowRank]]
    batch: dict[str, dict[str, Tensor]]


class TextbookLinear(nn.Module):
    """W0 z + B (c * (A z)) as one writes it down, for (b)."""

    def __init__(self, ours: MergedLinear) -> None:
        super().__init__()
        self.base, self.A, self.B = ours.base, ours.A, ours.B
        self.task, self.coefficients = ours.task, ours.coefficients

    def forward(self, z: Tensor) -> Tensor:
        """Return (..., d_out)."""
        c = self.coefficients()[self.task].to(z.dtype)
        return self.base(z) + nn.functional.linear(c * nn.functional.linear(z, self.A), self.B)


def build(sizes: Sizes) -> Setup:
    """Return model, random adapters on q_proj and v_proj, and a random batch; the same for the same sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        use_cache=False,
    )
    with torch.device(sizes.device):
        base = LlamaForCausalLM(config).to(getattr(torch, sizes.dtype)).requires_grad_(False).eval()
        adapted = [n for n, m in base.named_modules() if n.endswith(("q_proj", "v_proj")) and isinstance(m, nn.Linear)]
        d = sizes.hidden
        experts = {
            f"task{k}": {
                n: LowRank(torch.randn(sizes.rank, d) / d**0.5, torch.randn(d, sizes.rank) / 50) for n in adapted
            }
            for k in range(sizes.tasks)
        }
        batch = {
            task: {
                "input_ids": torch.randint(sizes.vocabulary, (sizes.batch, sizes.tokens)),
                "attention_mask": torch.ones(sizes.batch, sizes.tokens, dtype=torch.long),
            }
            for task in experts
        }
        objective = NSC(projections=["v_proj"])
        objective.prepare(base, experts)
        coefficients = Coefficients(adapted, list(experts)).to(sizes.device)
        merged = attach(base, experts, coefficients)
    return Setup(base, merged, objective.to(sizes.device), coefficients, experts, batch)


def fused_truncated(s: Setup) -> Tensor:
    """(a) Return the loss after one backward pass."""
    losses: dict[str, Tensor] = {}
    for group in fuse(s.batch):
        losses |= s.objective.losses(s.merged, group)
    loss = torch.stack(list(losses.values())).mean()
    loss.backward()
    return loss.detach()


def per_task_full(s: Setup, inverses: dict[tuple[str, str], Tensor]) -> Tensor:
    """(b) Return the loss after one full pass and backward per task, as Algorithm 1 has it."""
    total = torch.zeros((), device=next(s.base.parameters()).device)
    for task, inputs in s.batch.items():
        seen: dict[str, Tensor] = {}
        hooks = [
            s.base.get_submodule(t).register_forward_pre_hook(
                lambda m, args, t=t, seen=seen: seen.__setitem__(t, args[0])
            )
            for t in s.objective.targets
        ]
        s.base(**inputs)
        for hook in hooks:
            hook.remove()
        ratios = []
        for layer, z in seen.items():
            z = z.float()
            y = z @ s.experts[task][layer].A.float().T
            q = ((y @ inverses[task, layer]) * y).sum(-1) / z.square().sum(-1)
            ratios.append((1 - q).clamp_min(1e-8).sqrt().mean())
        loss = torch.stack(ratios).mean() / len(s.batch)
        loss.backward()
        total += loss.detach()
    return total


def floor(s: Setup) -> Tensor:
    """(c) Return some scalar after forward and backward through the bare base up to the last target layer."""
    (group,) = fuse(s.batch)
    captured: list[Tensor] = []
    last = max(s.objective.targets, key=list(s.merged.layers).index)
    block = s.base.get_submodule(last.rpartition(".self_attn")[0])

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0])
        raise StopIteration

    hook = block.self_attn.v_proj.register_forward_pre_hook(stop)
    embeddings = s.base.get_input_embeddings()(group.inputs["input_ids"]).requires_grad_()
    try:
        s.base(inputs_embeds=embeddings, attention_mask=group.inputs["attention_mask"])
    except StopIteration:
        pass
    finally:
        hook.remove()
    loss = captured[0].float().square().mean()
    loss.backward()
    return loss.detach()


def steps(sizes: Sizes) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Coefficients]]:
    """Return the three ways as functions of nothing, and the coefficients of (a) and (b); a model for each."""
    ours, textbook, bare = (build(sizes) for _ in WAYS)
    for name, layer in textbook.merged.layers.items():
        replace_module(textbook.base, name, TextbookLinear(layer))
    bare.merged.detach()
    inverses = {
        (task, t): torch.linalg.inv(layers[t].A.double() @ layers[t].A.double().T).float()
        for task, layers in textbook.experts.items()
        for t in textbook.objective.targets
    }
    ways: dict[str, Callable[[], Tensor]] = {
        "a": lambda: fused_truncated(ours),
        "b": lambda: per_task_full(textbook, inverses),
        "c": lambda: floor(bare),
    }
    return ways, {"a": ours.coefficients, "b": textbook.coefficients}


def timed(step: Callable[[], Tensor], device: str) -> float:
    """Return the seconds of one step."""
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(way: str, sizes: Sizes) -> int:
    """Return the bytes that one step adds at its peak, in a process of its own; Linux or CUDA."""
    ways, _ = steps(sizes)
    if sizes.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ways[way]()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = resident("VmRSS")
    ways[way]()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return one of the process's memory figures, bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main(sizes: Sizes = Sizes(), repeats: int = 10, threads: int = 2) -> None:
    """Compare the three ways.

    Args:
        sizes: Sizes of model and batch.
        repeats: Timed rounds; each runs (a), (b) and (c) once, in turn.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    ways, coefficients = steps(sizes)

    results = {}
    for way in ("a", "b"):
        loss = float(ways[way]())
        results[way] = loss, [None if p.grad is None else p.grad.clone() for p in coefficients[way].parameters()]
    (loss_a, grads_a), (loss_b, grads_b) = results["a"], results["b"]
    pairs = [(a, b) for a, b in zip(grads_a, grads_b, strict=True) if a is not None or b is not None]
    scale = max(float(b.abs().max()) for _, b in pairs)
    worst = max(float((a - b).abs().max()) for a, b in pairs) / scale

    ways["c"]()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in track(range(repeats), description="timing"):
        for way in WAYS:
            times[way].append(timed(ways[way], sizes.device))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(WAYS, pool.starmap(peak_memory, [(w, sizes) for w in WAYS], chunksize=1), strict=True))

    median = {way: statistics.median(values) for way, values in times.items()}
    names = {"a": "fused, truncated (ours)", "b": "per task, full passes (Algorithm 1)", "c": "floor: bare base"}
    table = Table(
        title=f"one learning step: {sizes.tasks} tasks x {sizes.batch} x {sizes.tokens} tokens, {sizes.device}"
    )
    for title in ("way", "seconds", "over (c)", "step's own peak memory, MB"):
        table.add_column(title)
    for way in WAYS:
        table.add_row(
            f"({way}) {names[way]}",
            f"{median[way]:.4f}",
            f"{median[way] / median['c']:.2f}",
            f"{memory[way] / 1e6:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(f"(b) / (a): {median['b'] / median['a']:.2f}   (a) / (c): {median['a'] / median['c']:.2f}")
    console.print(
        f"loss (a) {loss_a:.8f}, (b) {loss_b:.8f}; largest gradient difference {worst:.1e} of the largest entry"
    )
    tolerance = 1e-4 if sizes.dtype == "float32" else 5e-2
    if abs(loss_a - loss_b) > 1e-5 * abs(loss_b) + (0 if sizes.dtype == "float32" else 1e-2) or worst > tolerance:
        raise SystemExit("(a) and (b) disagree: the figures above compare different things.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
