"""LoRA-WEMoE, one expert after another: attention is summed, MLPs keep all experts, and a gate weighs them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nscmerge.candidates import merge_layers
from nscmerge.continual.algebra import at_least_fp32, combine, thin_svd
from nscmerge.continual.checks import Step, module_of
from nscmerge.continual.gated import Mlp, Observer, first_layers, from_tensors, gated, mlp_of, to_tensors
from nscmerge.continual.kinds import Merged
from nscmerge.continual.state import State, Weight
from nscmerge.continual.unlabelled import Lesson, Unlabelled, held_still
from nscmerge.draws import generator
from nscmerge.errors import MethodError, TargetError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.lazy import Lazy
from nscmerge.methods.options import check_number, check_switch, check_whole
from nscmerge.switch import attach_switch
from nscmerge.update import Update

ATTENTION = ("*attn*", "*attention*", "*Attention*")
MLP = ("*mlp*", "*DenseReluDense*", "*intermediate.dense", "*output.dense", "*feed_forward*", "*ffn*")
#: Rank of all experts but the first in the authors' code.
_LATER_RANK = 16


@dataclass(frozen=True, kw_only=True)
class LoraWemoe(Unlabelled):
    """Attention: M_t = M_{t-1} + lam delta_t. MLPs: W_0 + sum_e g_e delta_e, g = W mean(x) + b read off their input.

    An expert of an MLP weight is delta_t cut to ``rank`` (adapters up to that rank as they are). The gate averages the
    MLP's input over tokens and batch, so its predictions depend on what else is in a batch; ``per_sample`` ends that.
    Step t adds a row to every gate, drawn N(0, 0.01^2), bias ``lam``; all rows are learned on the entropy of task t.
    Everything else stays at the base model, biases of MLPs too. Without a single MLP expert nothing is learned, no
    model is needed, and the method is task arithmetic on attention.

    What runs exactly is :meth:`attached`. The update of a merge holds fixed weights: for every task those that the
    gates give for its own mean MLP input, kept from the step in which it came; without a task, for the mean over tasks.

    ``papercode``: experts after the first have rank 16.

    Args:
        rank: Largest rank of an MLP expert; 64 in the paper.
        gate_std: Standard deviation of a new row of a gate.
        per_sample: Whether gates average over tokens alone.
        attention: Names or patterns of the attention's layers and tensors.
        mlp: Names or patterns of the MLPs' layers; what ``attention`` fits is none of them.
        seed: Of the gates, together with layer and step.

    Source: WEMoE (Tang et al., arXiv:2402.00433) as NUFILT's comparison has it; specification, section 3.11.
    """

    NAME: ClassVar[str] = "lora_wemoe"

    rank: int = 64
    gate_std: float = 0.01
    per_sample: bool = False
    attention: Sequence[str] = field(default_factory=lambda: list(ATTENTION))
    mlp: Sequence[str] = field(default_factory=lambda: list(MLP))
    seed: int = 42

    def check(self) -> None:
        """Raise where an option is out of range."""
        super().check()
        check_whole(self.NAME, "rank", self.rank, at_least=1)
        check_number(self.NAME, "gate_std", self.gate_std, "[0, inf)")
        check_switch(self.NAME, "per_sample", self.per_sample)
        check_whole(self.NAME, "seed", self.seed)
        for name in ("attention", "mlp"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(one, str) for one in given):
                raise MethodError(f"{self.NAME}: {name} is {given!r}; expected a list of names or patterns.")
            # Lists, as a state file gives them back.
            object.__setattr__(self, name, list(given))

    def merge(self, step: Step) -> Merged:
        """Return the summed attention; gates and experts of MLPs are tensors beside it."""
        step.check_linear(self.NAME)
        attention = [name for name in step.names if self._is(name, self.attention)]
        experts = [name for name in step.names if self._is_expert(step, name)]
        if not attention and not experts:
            raise TargetError(
                f"{self.NAME}: none of the {len(step.names)} layers or tensors ('{step.names[0]}', ...) is attention "
                f"({', '.join(self.attention)}) or the weight of an MLP ({', '.join(self.mlp)}). Set attention or mlp."
            )
        weights: dict[str, Weight] = {n: combine((1.0, step.old(n)), (self.lam, step.new(n))) for n in attention}
        if not experts:
            return Merged(weights)
        lesson = self.lesson(step.expert)
        with held_still(lesson.model), _static(lesson.model, weights, step.layers):
            mlps = self._grown(step, experts, lesson)
            mlps, log = self._learned(step, mlps, lesson)
        return Merged(weights, tensors=to_tensors(mlps), log=log)

    def _is(self, name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(module_of(name), p) for p in patterns)

    def _is_expert(self, step: Step, name: str) -> bool:
        return self._is(name, self.mlp) and not self._is(name, self.attention) and step.is_linear(name)

    def _grown(self, step: Step, names: Sequence[str], lesson: Lesson) -> dict[str, Mlp]:
        """Return all MLPs with the new expert and a new row of every gate.

        Raises:
            TargetError: An MLP does not run.
        """
        known = ModelNames(lesson.model)
        old = from_tensors(step.state.tensors)
        entries = {mlp_of(entry): entry for entry in old}
        paths = {name: known.path(module_of(name), step.expert.name) for name in names}
        if new := {mlp_of(path) for path in paths.values()} - entries.keys():
            candidates = [
                path
                for path, module in known.modules.items()
                if isinstance(module, nn.Linear)
                and mlp_of(path) in new
                and self._is(path, self.mlp)
                and not self._is(path, self.attention)
            ]
            (inputs,) = lesson.once(1)
            entries |= first_layers(lesson.model, candidates, lambda: lesson.call(lesson.model, inputs))
        experts: dict[str, dict[str, dict[int, LowRank]]] = {
            entry: {name: dict(own) for name, own in mlp.experts.items()} for entry, mlp in old.items()
        }
        for name in names:
            if (entry := entries.get(mlp_of(paths[name]))) is None:
                raise TargetError(
                    f"{self.NAME}: the MLP of layer '{name}' never runs for task '{step.expert.name}', so its gate has "
                    "nothing to read. Leave the layer out of mlp."
                )
            own = experts.setdefault(entry, {}).setdefault(name, {})
            if (expert := self._expert(step, name)) is not None:
                own[step.t - 1] = expert
        found = {}
        for entry in sorted(experts):
            width = known.modules[entry].in_features
            gate = old.get(entry, Mlp(torch.zeros(0, width), torch.zeros(0), torch.zeros(0, width)))
            rows = [self._row(entry, e, int(width)) for e in range(len(gate.bias), step.t)]
            some = {name: own for name, own in experts[entry].items() if own}
            found[entry] = Mlp(
                torch.cat([gate.weight, *rows]),
                torch.cat([gate.bias, torch.full((len(rows),), float(self.lam))]),
                torch.cat([gate.inputs, torch.zeros(len(rows), int(width))]),
                some,
            )
        return found

    def _row(self, entry: str, expert: int, width: int) -> Tensor:
        """Return the start of one expert's row of a gate, (1, d)."""
        return self.gate_std * torch.randn(1, width, generator=generator(self.seed, self.NAME, entry, str(expert)))

    def _expert(self, step: Step, name: str) -> LowRank | None:
        """Return the new expert of one name, at most ``rank``; None where it has none."""
        delta = step.new(name)
        rank = min(self.rank, _LATER_RANK) if self.variant == "papercode" and step.t > 1 else self.rank
        if isinstance(delta, LowRank) and delta.rank <= rank:
            return LowRank(delta.A.clone(), delta.scaling * at_least_fp32(delta.B)) if delta.rank else None
        u, s, vh = thin_svd(delta)
        cut = LowRank(vh[:rank].float().contiguous(), (u * s)[:, :rank].float().contiguous())
        return cut if cut.rank else None

    def _learned(
        self, step: Step, mlps: Mapping[str, Mlp], lesson: Lesson
    ) -> tuple[dict[str, Mlp], dict[str, dict[str, Any]]]:
        """Return the MLPs with learned gates and the new task's mean inputs, and the log."""
        gates = {e: (nn.Parameter(mlp.weight.clone()), nn.Parameter(mlp.bias.clone())) for e, mlp in mlps.items()}
        before = after = None
        if self.learns(step.expert):
            label = f"{self.NAME}, step {step.t}: learning"
            parameters = [parameter for pair in gates.values() for parameter in pair]
            with gated(lesson.model, mlps, gates, per_sample=self.per_sample):
                before, after = lesson.learn(
                    parameters, lesson.call, steps=self.steps, lr=self.lr, watch=step.watch, label=label
                )
        sums = {entry: torch.zeros(mlp.weight.shape[1], dtype=torch.float64) for entry, mlp in mlps.items()}
        counts = dict.fromkeys(mlps, 0.0)

        def observe(entry: str, total: Tensor, count: float) -> None:
            sums[entry] += total.to(sums[entry])
            counts[entry] += count

        self._run(lesson, mlps, gates, observe)
        found: dict[str, Mlp] = {}
        log: dict[str, dict[str, Any]] = {}
        for entry, mlp in mlps.items():
            weight, bias = (parameter.detach() for parameter in gates[entry])
            inputs = mlp.inputs.clone()
            inputs[step.t - 1] = sums[entry] / max(counts[entry], 1.0)
            found[entry] = Mlp(weight, bias, inputs, mlp.experts)
            line = {"entropy_before": before, "entropy_after": after, "gates": found[entry].gates(inputs[-1]).tolist()}
            log |= {name: line for name in mlp.experts}
        return found, log

    def _run(
        self, lesson: Lesson, mlps: Mapping[str, Mlp], gates: Mapping[str, tuple[Tensor, Tensor]], observe: Observer
    ) -> None:
        with torch.no_grad(), gated(lesson.model, mlps, gates, per_sample=self.per_sample, observe=observe):
            for inputs in lesson.once(max(self.steps, 1)):
                lesson.call(lesson.model, inputs)

    @contextmanager
    def attached(self, state: State, model: nn.Module) -> Iterator[nn.Module]:
        """Run ``model``, in place, as the merge with its gates until the block ends: what the method is exactly.

        Args:
            state: The merge.
            model: Its base model.

        Raises:
            AdapterError: It is another base model.
        """
        mlps = from_tensors(state.tensors)
        gates = {entry: (mlp.weight, mlp.bias) for entry, mlp in mlps.items()}
        with _static(model, state.merged, state.layers), gated(model, mlps, gates, per_sample=self.per_sample):
            yield model

    def update(self, state: State) -> Update:
        """Return fixed weights: for each task at its own mean MLP input, and for no task at the mean over tasks."""
        plain = super().update(state)
        mlps = from_tensors(state.tensors)
        places = {name: entry for entry, mlp in mlps.items() for name in mlp.experts}
        if not places:
            return plain

        def routed(name: str, task: int | None) -> Weight:
            mlp = mlps[places[name]]
            delta = mlp.delta(name, mlp.inputs.mean(0) if task is None else mlp.inputs[task])
            if name in plain.dense:
                return delta.dense().float()
            return LowRank(delta.A.float(), delta.B.float())

        def layer(name: str) -> Weight:
            return routed(name, None) if name in places else plain.layers[name]

        def tensor(name: str) -> Tensor:
            found = routed(name, None) if name in places else plain.dense[name]
            return found.dense() if isinstance(found, LowRank) else found

        def own(number: int) -> Mapping[str, Weight]:
            return Lazy(sorted(places), lambda name: routed(name, number))

        return replace(
            plain,
            layers=Lazy(list(plain.layers), layer),
            dense=Lazy(list(plain.dense), tensor),
            per_task={one.name: own(number) for number, one in enumerate(state.absorbed)},
        )

    def notes(self, state: State) -> list[str]:
        """Return what is fixed here that the method leaves to its gates, or that there are none."""
        if not state.tensors:
            return ["No MLP weight has an expert: no gate, nothing learned; attention as in task arithmetic."]
        notes = [
            "Gates read every batch; these weights are those that they give for each task's own mean MLP input, and, "
            "without a task, for the mean over tasks. LoraWemoe.attached runs the gates themselves."
        ]
        for one in state.absorbed:
            if all(line.get("entropy_before") is None for line in one.log.values()):
                notes.append(f"'{one.name}' came in without learning.")
        return notes


@contextmanager
def _static(model: nn.Module, weights: Mapping[str, Weight], layers: Sequence[str] | frozenset[str]) -> Iterator[None]:
    """Run a model, in place, with fixed updates of some names until the block ends."""
    plain = Update(
        {name: weights[name] for name in weights if name in layers},
        {name: x for name in weights if name not in layers and isinstance(x := weights[name], Tensor)},
    )
    switch = attach_switch(model, {"merge": merge_layers(model, plain, (), LoraWemoe.NAME)[None]})
    try:
        switch.activate("merge")
        yield
    finally:
        switch.detach()
