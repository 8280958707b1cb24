"""ScaleSearch: measures closed-form merges at many scales in a Trainer's validation loop, and keeps the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from nscmerge.adapters import Adapter
from nscmerge.base_model import BaseModel, load_base_model, resolve_source
from nscmerge.candidates import ClosedForm, expert_layers, merge_layers
from nscmerge.errors import ConfigError
from nscmerge.folders import check_absent
from nscmerge.preflight import preflight
from nscmerge.search.criterion import Criterion
from nscmerge.search.curve import Curve, MethodResult, Point, equal_size
from nscmerge.search.grid import Grid, best_scale
from nscmerge.search.identity import adapter_identity, base_identity, candidate_keys, criterion_identity
from nscmerge.search.journal import Journal
from nscmerge.search.plan import Candidate, Plan, Samples, Work
from nscmerge.search.result import SearchResult
from nscmerge.search.signs import signs
from nscmerge.search.size import growth
from nscmerge.switch import Switch, attach_switch, by_update
from nscmerge.whole import on_model

BASE, EXPERT, JUDGE = "base", "expert", "judge"


class ScaleSearch(LightningModule):
    """Chooses the scale lambda of closed-form merges; every merge is made once, at scale 1, and is linear in lambda.

    ``search.run(trainer, data)`` measures the coarse grid, then the fine one around every criterion's best, then the
    judge; each is one ``trainer.validate`` with one progress bar. Interrupted, it goes on where it stopped: finished
    candidates stand in ``OUTPUT.partial.jsonl`` beside the output until that is written.

    Args:
        base_model: Frozen base, as :func:`nscmerge.base_model.load_base_model` reads it; a module is changed while the
            search runs, and put back.
        experts: Adapter by task: PEFT folder, hub id, ``package:NAME/FOLDER``, or an :class:`Adapter`.
        methods: What to merge, by the name that the tables show; ``lam`` must be left at 1.
        criteria: By name: what scales are compared by; each makes its own choice.
        grid: Scales to try.
        refine: Curves around whose best the fine grid is measured; None refines all. A curve is named like its
            criterion, a further reading ``criterion.reading``.
        judge: Measured at ``judge_at``, at all choices, at scale 1 and where the merged update is as large as the mean
            expert's; nothing is chosen by it.
        judge_at: Scales among which the judge's own best (the oracle) is sought; None takes the coarse grid.
        merges_for: Curves whose choice is written as merge folders; None writes all.
        base_sha256: Hash that a local base model's weights must have; None takes any.
        dtype: Dtype of the base model; None keeps the stored one.
        output: Folder to write; must not exist. None only returns the result.

    Raises:
        OutputExistsError: ``output`` is there already.
        ConfigError: A name is unknown or used twice, or a method brings a scale of its own.
        AdapterError, ShapeError: Adapters cannot be read or do not belong together.
    """

    model: nn.Module

    def __init__(
        self,
        base_model: BaseModel,
        experts: Mapping[str, str | Path | Adapter],
        methods: dict[str, ClosedForm],
        criteria: dict[str, Criterion],
        grid: Grid | None = None,
        refine: list[str] | None = None,
        judge: Criterion | None = None,
        judge_at: list[float] | None = None,
        merges_for: list[str] | None = None,
        base_sha256: str | None = None,
        dtype: str | None = None,
        output: Path | None = None,
    ) -> None:
        super().__init__()
        if output is not None:
            check_absent(output)
        _check_names(methods, criteria)
        self.experts = preflight({t: resolve_source(e) if isinstance(e, str) else e for t, e in experts.items()})
        self.methods, self.grid, self.output = methods, grid or Grid(), output
        self.criteria: dict[str, Criterion] = {**criteria, **({JUDGE: judge} if judge is not None else {})}
        self.judge_at = self.grid.coarse() if judge_at is None else judge_at
        self._modules_of_criteria = nn.ModuleList(self.criteria.values())
        self.curves = [_curve(name, suffix) for name, c in criteria.items() for suffix in c.suffixes]
        self.refine = self._known_curves("refine", refine)
        self.merges_for = self._known_curves("merges_for", merges_for)
        self._source = (base_model, dtype, base_sha256)
        self._journal = Journal(output.with_name(f"{output.name}.partial.jsonl") if output is not None else None)
        self._todo: list[Candidate] = []
        self._switch: Switch | None = None
        self._attached: str | None = None

    def _known_curves(self, option: str, names: list[str] | None) -> list[str]:
        if unknown := sorted(set(names or ()) - set(self.curves)):
            raise ConfigError(f"{option} names {unknown}, which are no curves here; known: {', '.join(self.curves)}.")
        return self.curves if names is None else names

    def run(self, trainer: Trainer, data: LightningDataModule, config: Mapping[str, Any] | None = None) -> SearchResult:
        """Return the result, and write it if there is an output folder.

        Args:
            trainer: Runs the validation loops; one process.
            data: Label-free validation batches ``{task: inputs}``; for labelled criteria also
                ``labelled_dataloaders(split, samples, batch_size)``.
            config: Whatever the record should say of how the search was started, JSON-able.

        Raises:
            ConfigError: Several processes, data of other tasks, or a method without one finite value.
            MethodError: A method refuses its options.
        """
        if trainer.world_size > 1:
            raise ConfigError(f"a search runs in one process, got {trainer.world_size}; set trainer.devices to 1.")
        inputs = {task: adapter_identity(expert) for task, expert in self.experts.items()}
        if any(expert.saved for expert in self.experts.values()):
            self.configure_model()  # whole tensors have a delta only beside the base
        self.updates = {name: spec.merge(self.experts) for name, spec in self.methods.items()}
        self.growth = {name: growth(update, self.experts) for name, update in self.updates.items()}
        data.prepare_data()
        for stage in sorted({criterion.stage for criterion in self.criteria.values()} | {"validate"}):
            data.setup(stage)
        self._data = data
        self.samples = {name: Samples.of(criterion, data) for name, criterion in self.criteria.items()}
        self._check_data()
        self.configure_model()
        base, dtype, expected = self._source
        self.origin = {
            "base": base_identity(base, dtype, expected),
            "inputs": inputs,
            "criteria": {n: criterion_identity(c, self.samples[n]) for n, c in self.criteria.items()},
            **({"data": note} if (note := getattr(data, "note", None)) else {}),
        }
        self._keys = candidate_keys(self.origin, {BASE: BASE, EXPERT: EXPERT, **self.methods})
        stages = {"coarse grid": self._coarse, "fine grid": self._fine, "judge": self._judged}
        for name, candidates in stages.items():
            wanted = list(dict.fromkeys(candidates()))
            self._todo = [c for c in wanted if self._journal.get(self._keys[c[:2]], c.lam) is None]
            print(f"{name}: {len(wanted)} candidates, {len(wanted) - len(self._todo)} measured before", flush=True)
            if self._todo:
                trainer.validate(self, verbose=False)
                self._detach()
            if name == "coarse grid":
                self._check_feasible()
        origin = {**self.origin, "grid": asdict(self.grid), "refine": self.refine}
        result = SearchResult([self._result(name) for name in self.methods], self.updates, origin)
        if self.output is not None:
            result.write(self.output, self.merges_for, config)
            self._journal.remove()
        return result

    def configure_model(self) -> None:
        """Load the base model and prepare the criteria, once."""
        if hasattr(self, "model"):
            return
        model = load_base_model(*self._source)
        self.experts = on_model(model, self.experts)
        for criterion in self.criteria.values():
            criterion.prepare(model, self.experts)
        self.model = model

    def val_dataloader(self) -> DataLoader[Work]:
        """Return the batches of all candidates that are left to measure in this stage."""
        plan = Plan(self._todo, self.criteria, self.samples, self._data)
        return DataLoader(plan, batch_size=None)

    def validation_step(self, work: Work, batch_idx: int) -> None:
        """Measure one batch of one candidate; a finished candidate goes to the working file."""
        candidate = self._todo[work.number]
        criterion = self.criteria[candidate.criterion]
        if work.first:
            criterion.reset()
        switch = self._attach(candidate)
        active = {task: None if candidate.method == BASE else self._active[task] for task in work.tasks}
        for update, tasks in by_update(active).items():
            switch.activate(update, candidate.lam)
            criterion.update(self.model, tuple(tasks), work.batch)
        if work.last:
            self._journal.add(self._keys[candidate[:2]], candidate.lam, criterion.compute(), *candidate[:2])

    def _attach(self, candidate: Candidate) -> Switch:
        """Return the switch of the candidate's method, which is attached if another one is."""
        method = EXPERT if candidate.method in (BASE, EXPERT) else candidate.method
        if self._attached != method:
            self._detach()
            if method == EXPERT:
                layers = {task: expert_layers(self.model, e, task) for task, e in self.experts.items()}
                self._active = {task: task for task in self.experts}
            else:
                found = merge_layers(self.model, self.updates[method], self.experts, method)
                layers = {key or method: weights for key, weights in found.items()}
                self._active = {task: task if task in found else method for task in self.experts}
            self._switch, self._attached = attach_switch(self.model, layers), method
        assert self._switch is not None  # for the type checker
        return self._switch

    def _detach(self) -> None:
        if self._switch is not None:
            self._switch.detach()
        self._switch = self._attached = None

    def _coarse(self) -> Iterator[Candidate]:
        for name in self.criteria:
            yield Candidate(EXPERT, name, 1.0)
            yield Candidate(BASE, name, 0.0)
        for method in self.methods:
            for lam in self.grid.coarse():
                yield from (Candidate(method, name, lam) for name in self.criteria if name != JUDGE)

    def _fine(self) -> Iterator[Candidate]:
        for method in self.methods:
            for curve in self.refine:
                for lam in self._fine_scales(method, curve):
                    yield Candidate(method, curve.partition(".")[0], lam)

    def _fine_scales(self, method: str, curve: str) -> list[float]:
        coarse = self._curve(method, curve, self.grid.coarse())
        return [] if coarse.chosen is None or curve not in self.refine else self.grid.around(coarse.chosen)

    def _judged(self) -> Iterator[Candidate]:
        if JUDGE in self.criteria:
            for method in self.methods:
                yield from (Candidate(method, JUDGE, lam) for lam in self._judged_scales(method))

    def _judged_scales(self, method: str) -> list[float]:
        chosen = [self._chosen_curve(method, curve).chosen for curve in self.curves]
        chosen.append(equal_size(self.growth[method]))
        return sorted({*self.judge_at, 1.0, *(lam for lam in chosen if lam is not None)})

    def _chosen_curve(self, method: str, curve: str) -> Curve:
        return self._curve(method, curve, [*self.grid.coarse(), *self._fine_scales(method, curve)])

    def _curve(self, method: str, name: str, scales: list[float]) -> Curve:
        criterion_name, _, suffix = name.partition(".")
        criterion = self.criteria[criterion_name]

        def values(of: str, lam: float) -> dict[str, float]:
            measured = self._journal.get(self._keys[of, criterion_name], lam)
            assert measured is not None  # every stage measures what the next one asks for
            return measured[suffix]

        experts = values(EXPERT, 1.0)
        points = {lam: Point.of(criterion, values(method, lam), experts, suffix) for lam in sorted(scales)}
        expert, base = (Point.of(criterion, values(*of), experts, suffix) for of in ((EXPERT, 1.0), (BASE, 0.0)))
        return Curve(name, criterion.higher_is_better, points, expert, base, criterion.label_free)

    def _result(self, method: str) -> MethodResult:
        curves = {name: self._chosen_curve(method, name) for name in self.curves}
        judged = self._curve(method, JUDGE, self._judged_scales(method)) if JUDGE in self.criteria else None
        size = self.growth[method]
        spec = self.methods[method]
        return MethodResult(method, spec, size, curves, judged, self.judge_at, signs(curves, self.grid, size))

    def _check_feasible(self) -> None:
        empty = [
            f"method '{method}' by '{curve}'"
            for method in self.methods
            for curve in self.curves
            if best_scale({lam: p.total for lam, p in self._curve(method, curve, self.grid.coarse()).points.items()})
            is None
        ]
        if empty:
            kept = f" What was measured is kept in {self._journal.path}." if self._journal.path else ""
            raise ConfigError(
                f"no feasible scale: all values between {self.grid.start} and {self.grid.stop} are not finite for "
                f"{', '.join(empty)}. Lower model.init_args.grid, or leave these methods out.{kept}"
            )

    def _check_data(self) -> None:
        for name, samples in self.samples.items():
            if set(samples.tasks) != set(self.experts):
                raise ConfigError(
                    f"criterion '{name}' finds data of the tasks {sorted(samples.tasks)}, the experts are "
                    f"{sorted(self.experts)}; make model.init_args.experts and data.init_args.tasks equal."
                )


def _curve(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name


def _check_names(methods: Mapping[str, ClosedForm], criteria: Mapping[str, Criterion]) -> None:
    if not methods or not criteria:
        raise ConfigError(
            "a search needs at least one method and one criterion; set model.init_args.methods, criteria."
        )
    if taken := sorted({BASE, EXPERT} & set(methods)):
        raise ConfigError(f"a method is named '{taken[0]}', which the tables use themselves; give it another name.")
    for name in criteria:
        if name == JUDGE or "." in name or not name:
            raise ConfigError(f"a criterion is named '{name}'; names have no dot and are not '{JUDGE}'.")
    for name, spec in methods.items():
        if spec.lam != 1.0:
            raise ConfigError(f"method '{name}' has lam = {spec.lam}; the search chooses the scale, leave lam out.")
