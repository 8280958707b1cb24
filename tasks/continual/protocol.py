"""The protocol: every method over every order, all tasks seen so far tested after each step; resumable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer

from nscmerge.adapters import Adapter
from nscmerge.errors import ConfigError
from nscmerge.update import Update
from tasks.continual.module import ContinualBenchmark, ContinualForm
from tasks.continual.moments import input_moments
from tasks.continual.record import FORMAT, Run, read_json, read_run, write_json, write_run
from tasks.continual.results import Column, Results
from tasks.continual.steps import Moments, advance
from tasks.expert import versions

REFERENCE = "reference.json"


def run(trainer: Trainer, module: ContinualBenchmark, data: LightningDataModule) -> Results:
    """Return the results of a whole protocol; what the output folder holds already is not measured again.

    Order by order, so that an interrupted protocol has equally many orders of all methods, but for one.

    Args:
        trainer: Whose ``test`` is called after every step.
        module: What to test.
        data: All tasks' data.

    Raises:
        ConfigError: The output folder holds the results of another protocol.
    """
    data.prepare_data()
    data.setup("test")  # what data say of themselves, they say afterwards
    columns, base, own = reference(trainer, module, data)
    jobs = [
        (name, form, number, order)
        for number, order in enumerate(module.orders, start=1)
        for name, form in module.methods.items()
    ]
    runs = [_begun(module.folder, name, form, number, order) for name, form, number, order in jobs]
    moments: Moments | None = None
    if module.losses and module.activations and not all(one.complete for one in runs):
        moments = input_moments(module.to(trainer.strategy.root_device), data, module.activations)

    def score(update: Update, tasks: Sequence[str]) -> dict[str, float]:
        values = module.score(trainer, data, update, tasks)
        return {task: values[task][columns[task].metric] for task in tasks}

    for i, (name, form, number, _) in enumerate(jobs):
        file = _file(module.folder, name, number)

        def save(one: Run, file: Path = file) -> None:
            if trainer.is_global_zero:
                write_run(one, file)

        def expert(task: str, form: ContinualForm = form) -> Adapter:
            if form.learns:  # a test ends with everything on the CPU
                module.to(trainer.strategy.root_device)
            return module.expert(task)

        if not runs[i].complete:
            print(f"{name}, order {number} of {len(module.orders)}", flush=True)
            runs[i] = advance(
                runs[i], module.made(form, data), expert, score, save, losses=module.losses, moments=moments
            )
            results = Results(columns, base, own, [one for one in runs if one.complete], module.percent)
            print(results.line(name), flush=True)
    return Results(columns, base, own, runs, module.percent, note=getattr(data, "note", None))


def reference(
    trainer: Trainer, module: ContinualBenchmark, data: LightningDataModule
) -> tuple[dict[str, Column], dict[str, float], dict[str, float]]:
    """Return what each task's score means, and the scores of plain base and of the experts; measured once.

    Raises:
        ConfigError: The output folder belongs to other tasks, experts or data.
    """
    file = module.folder / REFERENCE
    origin = json.loads(json.dumps(module.origin(data), default=str))
    if file.is_file():
        content = read_json(file)
        if other := [key for key, value in origin.items() if content["origin"].get(key) != value]:
            raise ConfigError(
                f"{file}: {', '.join(other)} of the results there differ from this protocol's. Name another "
                "model.output, or set what it was made with."
            )
        columns = {task: Column(**column) for task, column in content["tasks"].items()}
        return columns, content["base"], content["expert"]
    columns = {
        name: Column(task.primary, task.higher_is_better)
        for name in module.task_names
        for task in [module.task_of(name)]
    }
    print("base and experts", flush=True)
    base_values = module.score(trainer, data, None, module.task_names)
    base = {task: base_values[task][column.metric] for task, column in columns.items()}
    expert = {}
    for task, column in columns.items():
        expert[task] = module.score(trainer, data, module.expert(task), [task])[task][column.metric]
    if trainer.is_global_zero:
        tasks = {task: {"metric": c.metric, "higher_is_better": c.higher_is_better} for task, c in columns.items()}
        content = {"format": FORMAT, "tasks": tasks, "base": base, "expert": expert}
        write_json({**content, "origin": origin, "versions": versions()}, file)
    return columns, base, expert


def _file(output: Path, name: str, number: int) -> Path:
    return output / "runs" / re.sub(r"[^\w.-]", "_", name) / f"order_{number}.json"


def _begun(output: Path, name: str, form: ContinualForm, number: int, order: Sequence[str]) -> Run:
    """Return what the output folder has of a run, or an empty one.

    Raises:
        ConfigError: What is there has other options or another order.
    """
    run = Run(name, form.method, form.variant, form.settings(), list(order))
    file = _file(output, name, number)
    if not file.is_file():
        return run
    found = read_run(file)
    mine: Mapping[str, Any] = {"method": run.method, "variant": run.variant, "options": run.options, "order": run.order}
    theirs = {key: getattr(found, key) for key in mine}
    if other := [key for key in mine if mine[key] != theirs[key]]:
        raise ConfigError(
            f"{file} was made with {', '.join(f'{key} {theirs[key]}' for key in other)}; now "
            f"{', '.join(f'{key} is {mine[key]}' for key in other)}. Name the method differently, or another "
            "model.output."
        )
    return found
