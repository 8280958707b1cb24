"""The ``README.md`` of a merge folder, in the form that model hubs show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nscmerge.masked import MaskedWeights
from nscmerge.precision import Audit
from nscmerge.update import Recipe, Update

_LOAD_ADAPTER = """```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, "<this folder>")  # base: the loaded base model
```"""

_ADD_DELTA = """```python
from pathlib import Path
from safetensors.torch import load_file
weights = dict(base.named_parameters())
for file in sorted(Path("<this folder>").glob("delta*.safetensors")):
    for name, delta in load_file(file).items():
        weights[name].data += delta.to(weights[name])  # .T first where the base stores (d_in, d_out), as GPT-2 does
```"""

_MASKED = """They are the ones above where those agree in sign with the task's own adapter in
`tasks/<task>`, times the task's rescaler in `receipt.json`. As a checkpoint of the whole model:

```python
from nscmerge.update import load_update
load_update("<this folder>").fold_into("<folder of the base model>", "<new folder>", task="<task>")
```"""


def card(update: Update, layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the card: what was merged and how, how to load it, coefficients in short, what was left out, licence.

    Args:
        update: The merge.
        layers: The receipt's lines of its layers; those with a ``rank`` stand in the PEFT adapter.
    """
    low = any("rank" in line for line in layers.values())
    full = bool(update.dense) or any("rank" not in line for line in layers.values())
    return "\n".join([*front_matter(update), *_sections(update, low, full)]) + "\n"


def front_matter(update: Update, library: str = "peft") -> list[str]:
    """Return the lines that model hubs read."""
    head = ["---", f"library_name: {library}", "tags: [lora, merge, nscmerge]"]
    if update.base_model:
        # JSON quoting is YAML quoting for one string.
        head.append(f"base_model: {json.dumps(update.base_model)}")
    return [*head, "---", ""]


def _sections(update: Update, low: bool, full: bool) -> Iterator[str]:
    recipe = update.recipe
    yield "# Merged LoRA adapters\n"
    yield f"Base model: {update.base_model or 'unknown; take the one that the inputs were trained on'}.\n"
    if recipe is not None:
        yield from made_by(recipe)
    yield from _how_to_load(update, low, full)
    if recipe is not None and recipe.coefficients:
        yield "## Coefficients\n\n| task | layers | mean | min | max |\n|---|---|---|---|---|"
        for task, by_layer in recipe.coefficients.items():
            if values := [v for v in by_layer.values() if v is not None]:
                mean = sum(values) / len(values)
                yield f"| {task} | {len(values)} | {mean:.4f} | {min(values):.4f} | {max(values):.4f} |"
        yield "\nEvery single one is in `receipt.json`.\n"
    yield from _left_out_and_licence(recipe)


def checkpoint_card(update: Update, audit: Audit, task: str | None) -> str:
    """Return the card of a checkpoint that the merge was folded into.

    Args:
        update: The merge.
        audit: What rounding took from it.
        task: Whose weights they are, None for one model of all tasks.
    """
    head = front_matter(update, "transformers")
    return "\n".join([*head, *_checkpoint_sections(update, audit, task)]) + "\n"


def _checkpoint_sections(update: Update, audit: Audit, task: str | None) -> Iterator[str]:
    yield f"# Merged model{f' for the task {task}' if task is not None else ''}\n"
    yield f"Base model: {update.base_model or 'the one that the receipt names'}, with a merge of LoRA adapters added.\n"
    if update.recipe is not None:
        yield from made_by(update.recipe)
    yield f"## Precision\n\nOf the merge, {audit.summary()}.\n"
    yield from _left_out_and_licence(update.recipe)


def _left_out_and_licence(recipe: Recipe | None) -> Iterator[str]:
    if recipe is not None and recipe.skipped:
        yield "## Left out\n"
        yield from (f"- `{name}`: {reason}" for name, reason in recipe.skipped.items())
        yield ""
    yield "## Licence\n"
    yield "The licences of the base model and of every input adapter apply to this merge; check each of them."


def made_by(recipe: Recipe) -> Iterator[str]:
    """Yield method, options and inputs."""
    options = ", ".join(f"{key} = {value}" for key, value in recipe.options.items() if not isinstance(value, dict))
    yield f"Method: `{recipe.method}` (variant `{recipe.variant}`{'; ' + options if options else ''}).\n"
    yield "| task | adapter | SHA-256 of its weights |\n|---|---|---|"
    yield from (f"| {i.name} | {i.source or 'in memory'} | {i.sha256 or ''} |" for i in recipe.inputs)
    yield "\nAll options, versions and ranks are in `receipt.json`.\n"
    yield from (f"{note}\n" for note in recipe.notes)


def _how_to_load(update: Update, low: bool, full: bool) -> Iterator[str]:
    yield "## How to load\n"
    if full:
        also = ", **before** PEFT wraps it. Both parts are needed" if low else "; there is no PEFT adapter here"
        yield f"`delta.safetensors` (or its shards) is added to the base model's own tensors{also}.\n\n{_ADD_DELTA}\n"
    if low:
        yield f"{_LOAD_ADAPTER}\n"
    if any(isinstance(weights, MaskedWeights) for weights in update.per_task.values()):
        yield f"Each task has weights of its own ({', '.join(update.per_task)}). {_MASKED}\n"
    elif update.per_task:
        yield f"Each task has weights of its own, in the same form, in `tasks/<task>` ({', '.join(update.per_task)}).\n"
