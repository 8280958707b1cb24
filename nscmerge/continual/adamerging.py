"""AdaMerging, one expert after another: how much of the new one, tensor by tensor, its own inputs decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nscmerge.continual.algebra import at_least_fp32, combine, dense
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import Merged
from nscmerge.continual.state import State, Weight
from nscmerge.continual.unlabelled import Head, Inputs, Lesson, Unlabelled, held_still
from nscmerge.errors import AdapterError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.methods.options import check_number
from nscmerge.quantized import factor_like
from nscmerge.surgery import linear_layer


@dataclass(frozen=True, kw_only=True)
class AdaMerging(Unlabelled):
    """M_t = M_{t-1} + Lambda_t o delta_t, one coefficient for every tensor (adapted matrix) of the new expert.

    Coefficients start at ``lam``, are clamped to [0, 1] in the forward pass and learned by Adam on the mean entropy of
    task t's own logits; those of earlier experts stay what they are. Adapters run factored. What the forward pass of
    task t never reaches keeps ``lam``, and the log says so.

    ``papercode``: M_t = Lambda_t o delta_t, restarted from the base model at every step, so that the merge holds the
    last expert alone; this is what the printed tables show.

    Source: Yang et al., arXiv:2310.02575; specification, section 3.10. The paper takes 5 images per class and batches
    of 16 for CLIP, 100 inputs and batches of 8 for Flan-T5.
    """

    NAME: ClassVar[str] = "adamerging"

    def check(self) -> None:
        """Raise where an option is out of range."""
        super().check()
        check_number(self.NAME, "lam", self.lam, "[0, 1]")

    def merge(self, step: Step) -> Merged:
        """Return M_t, and every coefficient in the log."""
        kept = 0.0 if self.variant == "papercode" else 1.0
        own = [name for name in step.names if name in step.expert.layers or name in step.expert.dense]
        lam = dict.fromkeys(own, float(self.lam))
        log: dict[str, dict[str, Any]] = {name: {} for name in own}
        if self.learns(step.expert):
            learned, before, after = self._learn(step, own, self.lesson(step.expert), kept)
            for name, value in zip(own, learned, strict=True):
                # Adam leaves alone what never has a gradient, and moves the rest.
                log[name] = {"entropy_before": before, "entropy_after": after, "reached": value != self.lam}
                lam[name] = min(max(value, 0.0), 1.0)
        weights: dict[str, Weight] = {}
        for name in step.names:
            if name in lam:
                weights[name] = combine((kept, step.old(name)), (lam[name], step.new(name)))
                log[name] = {"lam": lam[name], **log[name]}
            elif kept:
                weights[name] = step.old(name)
        return Merged(weights, log=log)

    def _learn(
        self, step: Step, own: list[str], lesson: Lesson, kept: float
    ) -> tuple[list[float], float | None, float | None]:
        """Return the learned coefficients, not clamped, and the entropy before and after."""
        label = f"{self.NAME}, step {step.t}: learning"
        with held_still(lesson.model):
            # fp64, so that what does not move stays what it was; cast at the product.
            coefficients = nn.Parameter(torch.full((len(own),), float(self.lam), dtype=torch.float64))
            sums = {
                name: (
                    partial(_coefficient, coefficients, own.index(name)) if name in own else None,
                    step.old(name) if kept else None,
                    step.new(name),
                )
                for name in step.names
                if name in own or kept
            }
            with running(lesson.model, sums, lesson, step.expert.name) as run:
                before, after = lesson.learn(
                    [coefficients], run, steps=self.steps, lr=self.lr, watch=step.watch, label=label
                )
        return coefficients.detach().tolist(), before, after

    def notes(self, state: State) -> list[str]:
        """Return which experts came in without learning, and which coefficients no gradient reached."""
        notes = []
        for one in state.absorbed:
            lines = one.log.values()
            if not any("reached" in line for line in lines):
                notes.append(f"'{one.name}' came in at the start value {self.lam}: nothing was learned for it.")
            elif missed := sum(not line["reached"] for line in lines if "reached" in line):
                notes.append(f"'{one.name}': {missed} coefficients were reached by no gradient and keep {self.lam}.")
        return notes


#: One name: its coefficient, None for 0; the merge so far, None for zero; the new expert.
Sum = tuple[Callable[[], Tensor] | None, Weight | None, Weight]
#: Factors and their coefficient, None for 1.
Part = tuple[LowRank, Callable[[], Tensor] | None]


def _coefficient(coefficients: Tensor, index: int) -> Tensor:
    return coefficients[index].clamp(0, 1)


@contextmanager
def running(model: nn.Module, sums: Mapping[str, Sum], lesson: Lesson, owner: str) -> Iterator[Head]:
    """Run a base model as W_0 + M + lam delta until the block ends, and yield what calls it so.

    Factors run beside their linear layers; whole tensors are added up in fp32 at every call and cast once.

    Args:
        model: Base model, frozen.
        sums: By layer or tensor name.
        lesson: Whose head reads the model.
        owner: Of the new expert, for messages.

    Raises:
        AdapterError: A layer or tensor is not in the model, or has another shape there.
    """
    names = ModelNames(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors: dict[str, Callable[[], Tensor]] = {}
    seen: set[int] = set()
    with ExitStack() as stack:
        for name, (lam, old, new) in sums.items():
            if isinstance(new, LowRank):
                _, linear = linear_layer(names, name, new, owner)
                parts: list[Part] = [(old, None)] if isinstance(old, LowRank) and old.rank else []
                parts += [(new, lam)] if lam is not None else []
                if parts:
                    stack.callback(linear.register_forward_hook(_beside(linear, parts)).remove)
                continue
            path = _path(names, parameters, name, new, owner)
            base = parameters[path]
            if id(base) not in seen:  # a tied parameter may stand under two names, and has one delta
                tensors[path] = partial(_summed, base, None if old is None else dense(old), new, lam)
            seen.add(id(base))
        whole = _Whole(model, lesson.call)
        yield lambda _, inputs: functional_call(
            whole, {f"model.{path}": total() for path, total in tensors.items()}, (inputs,)
        )


class _Whole(nn.Module):
    """A model together with what calls it, so that parameters can be put in its place from outside."""

    def __init__(self, model: nn.Module, call: Head) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, inputs: Inputs) -> Any:
        """Return what the head gives."""
        return self._call(self.model, inputs)


def _beside(linear: nn.Linear, parts: Sequence[Part]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds ``sum_k c_k s_k B_k A_k x``; c is 1 where there is no coefficient."""
    like = factor_like(linear)
    A = torch.cat([x.A.to(like) for x, _ in parts])
    B = torch.cat([(x.scaling * at_least_fp32(x.B)).to(like) for x, _ in parts], dim=1)

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        scales = torch.cat([(torch.ones(()) if c is None else c()).expand(layer.rank) for layer, c in parts])
        down = nn.functional.linear(x, A.to(x.dtype)) * scales.to(x)
        return out + nn.functional.linear(down, B.to(x.dtype))

    return hook


def _path(names: ModelNames, parameters: Mapping[str, Tensor], name: str, delta: Tensor, owner: str) -> str:
    """Return the path of the model's parameter that a tensor name means.

    Raises:
        AdapterError: There is none, it has another shape, or it is quantised.
    """
    module, _, leaf = name.rpartition(".")
    path = f"{names.path(module, owner)}.{leaf}" if module else leaf
    found = parameters.get(path)
    if found is None or found.shape != delta.shape or not found.is_floating_point():
        got = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise AdapterError(
            f"tensor '{name}' of '{owner}' is {tuple(delta.shape)}, the base model's is {got}; a merge that runs needs "
            "a parameter of the same shape there, not quantised. Give the base model that the expert was trained from."
        )
    return path


def _summed(base: Tensor, old: Tensor | None, new: Tensor, lam: Callable[[], Tensor] | None) -> Tensor:
    """Return base + old + lam new, summed in fp32 at least, in the base's dtype."""
    total = at_least_fp32(base)
    if old is not None:
        total = total + old.to(total)
    if lam is not None:
        total = total + lam().to(total) * new.to(total)
    return total.to(base.dtype)
