r"""One learning step of NSC on the real shapes: LLaMA-3-8B and LLaVA-1.5-7B with random weights, made on the device.

Six rank-16 adapters on q_proj and v_proj, as the papers have them, are merged by MergeModule through the Trainer in a
few steps of AdamW. Beside each figure stands the floor, in the same process: a forward and a backward pass of the
bare base on the same batch, whole and stopped at the last target layer. Ratios are what counts.

    PYTHONPATH=. python benchmarks/large_base.py --out figures.json         # one GPU of 80 GB, a few minutes
    PYTHONPATH=. python benchmarks/large_base.py --tiny                     # real layer counts, small width, any CPU

Weights are random: times and memory are those of real ones, the ratio omega and the answers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.large_shapes import SHAPES, TINY, Batch, Shape, build, experts, inputs
from nscmerge import MergeModule
from nscmerge.batching import fuse
from nscmerge.checkpointing import checkpoint_blocks
from nscmerge.objectives import NSC
from nscmerge.objectives.base import Objective


@dataclass(frozen=True)
class Way:
    """One way to run a step: how graphs are built, whether blocks are recomputed, and which passes count."""

    accumulate: str = "fused"
    checkpointing: bool = False
    position: str = "first_token"


WAYS = {
    "fused": Way(),
    "one task at a time": Way("task"),
    "fused, recomputed blocks": Way(checkpointing=True),
    "one task at a time, recomputed blocks": Way("task", True),
}
#: Only for the model that generates.
ANSWERS = {
    "last token of the answer": Way(position="last_token"),
    "full sequence of the answer": Way(position="full_sequence"),
}


class Clock(Callback):
    """Seconds of every step after the first ones, the device waited for; peak memory over those steps."""

    def __init__(self, warm_up: int, cuda: bool) -> None:
        self.warm_up, self.cuda = warm_up, cuda
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if self.cuda:
            torch.cuda.synchronize()
            if batch_idx == self.warm_up:
                torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        if self.cuda:
            torch.cuda.synchronize()
        if batch_idx >= self.warm_up:
            self.seconds.append(time.perf_counter() - self._start)
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the base out of the module, for what the trainer does next is to move all of it to the CPU."""
        del pl_module.base


def fit(
    model: nn.Module, shape: Shape, batch: Batch, way: Way, steps: int, warm_up: int, device: str
) -> dict[str, Any]:
    """Return what a fit of ``warm_up + steps`` steps took; the model is as before afterwards.

    Raises:
        SystemExit: The loss is no number, or a coefficient that the targets reach did not move.
    """
    cuda = device == "cuda"
    undo = checkpoint_blocks(model) if way.checkpointing else None
    objective: Objective = NSC(
        projections=["v_proj"], position=way.position, max_new_tokens=shape.answer, eos_token_id=[]
    )  # type: ignore[arg-type]
    merge = MergeModule(
        model,
        experts(model, shape),
        objective=objective,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        accumulate=way.accumulate,  # type: ignore[arg-type]
    )
    clock = Clock(warm_up, cuda)
    resting = torch.cuda.memory_allocated() if cuda else 0
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, max_steps=warm_up + steps, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        with redirect_stdout(io.StringIO()):  # the monitor's table
            trainer.fit(merge, DataLoader([batch] * (warm_up + steps), batch_size=None))
        peak = torch.cuda.max_memory_allocated() if cuda else 0
    finally:
        if merge.merged is not None:
            merge.merged.detach()
        if undo is not None:
            undo()
    if not all(map(torch.isfinite, map(torch.tensor, clock.losses))):
        raise SystemExit(f"{way}: the loss is {clock.losses}.")
    moved = (merge.coefficients.matrix() - 0.4).abs().sum(1)
    reached = [bool(m > 0) for m in moved]
    expected = len(merge.coefficients.layers) - len(merge.unreached or ())
    if sum(reached) != expected or expected < len(reached) - 2:
        raise SystemExit(f"{way}: {sum(reached)} of {len(reached)} layers' coefficients moved, expected {expected}.")
    return {
        "seconds": statistics.median(clock.seconds),
        "fastest": min(clock.seconds),
        "peak_bytes": peak,
        "step_bytes": peak - resting,
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "coefficients": int(merge.coefficients.matrix().numel()),
        "layers_reached": sum(reached),
    }


class _Stop(Exception):
    """The last target layer has its input."""


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let embeddings ask for a gradient, so that the backward pass of the bare base runs through every block."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


def bare(model: nn.Module, batch: Mapping[str, Tensor], last: str | None) -> Callable[[], None]:
    """Return a forward and backward pass of the base alone; stopped before ``last`` where a layer is given."""

    def run() -> None:
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        hook = model.get_submodule(last).register_forward_pre_hook(stop) if last else None
        with differentiable(model):
            try:
                out = model(**batch)
                seen.append(out.logits if hasattr(out, "logits") else out.last_hidden_state)
            except _Stop:
                pass
            finally:
                if hook is not None:
                    hook.remove()
            seen[0].square().mean(dtype=torch.float32).backward()

    return run


def timed(run: Callable[[], None], steps: int, warm_up: int, cuda: bool) -> dict[str, Any]:
    """Return the median seconds of a pass and its peak memory."""
    seconds = []
    for step in range(warm_up + steps):
        if cuda:
            torch.cuda.synchronize()
            if step == warm_up:
                torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        if step >= warm_up:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    median = statistics.median(seconds)
    return {"seconds": median, "fastest": min(seconds), "peak_bytes": peak, "step_bytes": peak - resting}


def measure(name: str, shape: Shape, device: str, dtype: torch.dtype, steps: int, warm_up: int) -> dict[str, Any]:
    """Return all figures of one shape."""
    started = time.perf_counter()
    model, batch = build(shape, device, dtype), inputs(shape)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights", flush=True)
    (group,) = fuse(batch)
    on_device = {n: v.to(device) for n, v in group.inputs.items()}
    targets = sorted(n for n, _ in model.named_modules() if n.endswith(f".{shape.layers - 1}.self_attn.v_proj"))
    last = next(n for n in targets if "vision" not in n)
    found: dict[str, Any] = {}
    for floor, end in {"bare, whole": None, "bare, to the last target": last}.items():
        found[floor] = timed(bare(model, on_device, end), steps, warm_up, device == "cuda")
    ways = WAYS | (ANSWERS if shape.vision else {})
    for title, way in ways.items():
        clear()
        try:
            found[title] = fit(model, shape, batch, way, steps, warm_up, device)
        except torch.OutOfMemoryError as error:
            found[title] = {"out_of_memory": str(error).splitlines()[0]}
        print(f"  {title}: {found[title].get('seconds', 'out of memory')}", flush=True)
    show(name, found)
    samples = len(next(iter(group.inputs.values())))
    return {
        "shape": asdict(shape), "samples": samples, "tokens": int(group.inputs["attention_mask"].sum()),
        "padded": int(group.inputs["attention_mask"].numel()), "seconds_in_all": time.perf_counter() - started,
        "ways": found,
    }  # fmt: skip


def show(name: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of one shape."""
    floor, short = found["bare, whole"]["seconds"], found["bare, to the last target"]["seconds"]
    print(f"{name:<40}{'s/step':>9}{'/ whole':>9}{'/ cut':>8}{'peak GB':>9}{'step GB':>9}")
    for title, own in found.items():
        if "out_of_memory" in own:
            print(f"  {title:<38} out of memory")
            continue
        seconds = own["seconds"]
        print(
            f"  {title:<38}{seconds:>9.4f}{seconds / floor:>9.2f}{seconds / short:>8.2f}"
            f"{own['peak_bytes'] / 1e9:>9.2f}{own['step_bytes'] / 1e9:>9.2f}",
            flush=True,
        )


def clear() -> None:
    """Let go of what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small widths, real layer counts")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(args)
    if options.device == "cpu" and not options.tiny:
        parser.error("the real shapes want a GPU; add --tiny to run small ones here")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype), "torch": torch.__version__, "steps": options.steps,
    }  # fmt: skip
    for name in options.shapes:
        shape = (TINY if options.tiny else SHAPES)[name]
        figures[name] = measure(name, shape, options.device, dtype, options.steps, options.warm_up)
        clear()
        if options.out is not None:
            options.out.write_text(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
