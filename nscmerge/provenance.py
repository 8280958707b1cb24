"""Where a learned merge came from: everything that its receipt states."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch

from nscmerge.folding import table
from nscmerge.memory import peak_memory
from nscmerge.update import Input, Recipe

if TYPE_CHECKING:
    from nscmerge.module import MergeModule


def learned_recipe(module: MergeModule) -> Recipe:
    """Return the recipe of the merge as ``module`` holds it now; options and ratios as far as a trainer ran it."""
    coefficients = module.coefficients
    matrix = coefficients.matrix().cpu()
    moved = (matrix - coefficients.init).abs()
    outside = int(((matrix < 0) | (matrix > 1)).sum())
    notes = [
        f"Coefficients moved by {float(moved.mean()):.3f} on average, {float(moved.max()):.3f} at most, from "
        f"{coefficients.init}; {outside} of {matrix.numel()} lie outside [0, 1]."
    ]
    if module.unreached:
        notes.append(
            f"No target layer lies behind {len(module.unreached)} layers; their coefficients kept the start value: "
            f"{', '.join(module.unreached)}."
        )
    reason = "learned merges take linear layers only; this tensor keeps the base model's value"
    head = "task heads are never merged; every task keeps its own"
    taken = {name for linear in module.whole for name in (f"{linear.layer}.weight", f"{linear.layer}.bias")}
    skipped = {name: reason for e in module.experts.values() for name in (*e.saved, *e.dense) if name not in taken}
    skipped |= {name: head for e in module.experts.values() for name in e.head}
    seed = os.environ.get("PL_GLOBAL_SEED")
    return Recipe(
        method=type(module.objective).__name__.lower(),
        options=_options(module),
        inputs=tuple(Input.of(task, adapter) for task, adapter in module.experts.items()),
        coefficients=table(module.experts, coefficients, module.whole),
        seed=int(seed) if seed is not None else None,
        seconds=time.perf_counter() - module.started if module.started is not None else None,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory(),
        skipped=dict(sorted(skipped.items())),
        notes=notes,
        extra={
            "unreached": module.unreached or [],
            f"validation_{module.objective.quantity}_at_start": module.first_ratios,
            f"validation_{module.objective.quantity}_at_end": module.validation_ratios,
        },
    )


def _options(module: MergeModule) -> dict[str, Any]:
    coefficients, objective = module.coefficients, module.objective
    options: dict[str, Any] = {
        "init": coefficients.init,
        "granularity": coefficients.granularity,
        "bounds": coefficients.bounds,
        "accumulate": module.accumulate,
        **({"projector_coeff": module.projector_coeff} if module.whole else {}),
        "objective": objective.options(),
    }
    trainer = module._trainer
    if trainer is not None:
        options["steps"], options["precision"] = trainer.global_step, str(trainer.precision)
        options["processes"] = trainer.world_size
        data = getattr(trainer, "datamodule", None)
        options["data"] = {name: getattr(data, name, None) for name in ("batch_size", "split", "seed")}
        options["data"] |= {name: said for name in ("share_batches", "note") if (said := getattr(data, name, None))}
        for optimizer in trainer.optimizers:
            options["optimizer"] = {"name": type(optimizer).__name__, **optimizer.defaults}
    return options
