"""NUFILT: what is new is filtered through the null space of what is there; a small adapter gives some of it back."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nscmerge.continual.algebra import at_least_fp32, combine, dense
from nscmerge.continual.checks import Step, module_of
from nscmerge.continual.kinds import ContinualMethod, Merged
from nscmerge.continual.nufilt_layer import prepare
from nscmerge.continual.nufilt_solve import solve_adam, solve_least_squares
from nscmerge.continual.right_vectors import SVD_KINDS, SvdKind
from nscmerge.continual.state import State, Weight
from nscmerge.draws import generator
from nscmerge.errors import MethodError, TargetError
from nscmerge.factors import LowRank
from nscmerge.methods.options import check_choice, check_number, check_switch, check_whole
from nscmerge.naming import unknown

#: Below this root mean square of the first gradient Adam's eps 1e-8 is no longer negligible.
_TINY_GRADIENT = 1e-7


@dataclass(frozen=True, kw_only=True)
class Nufilt(ContinualMethod):
    """M_t = M + delta P + delta G H, with P = I - V_p V_p^T and V_p the top right singular vectors of M = M_{t-1}.

    G H is an adapter of rank l, fitted by some Adam steps to stay silent on V_p (stability) and to reach delta on the
    top right singular vectors V_v of delta (plasticity). M_1 = delta_1. Only selected weights of linear layers; the
    rest stays at the base model, also after the first step. No more singular vectors are used than a matrix's rank.

    ``papercode`` (full checkpoints only) filters the first expert too, through the singular vectors of a zero matrix
    (the first filter_rank input columns of delta_1 become zero), and has no rank rule.

    Args:
        filter_rank: r_p, columns of V_p at most. 0: no filter.
        adapter_rank: r_l, rank of the adapter. 0: filter only.
        task_rank: r_v, columns of V_v at most. 0: nothing to fit.
        steps: Adam steps. They regularise; see ``solver``.
        lr: Step size of Adam.
        sigma_init: Standard deviation of the drawn H.
        solver: ``adam``, or ``least_squares``: the exact minimum over the columns of delta, fitted too hard; an
            analysis, in which ``adapter_rank`` only counts as zero or not.
        filter: False for the ablation "without filter": M + delta (I + G H), V_p still in the loss.
        layers: Selected modules, by name or pattern (``*fc1``); None for all linear ones. The paper selects attention
            and fc1 of CLIP, all linear layers of the blocks of Flan-T5.
        normalize: Scale delta and M by delta's largest singular value inside the solve; for tiny task vectors.
        svd: ``exact``, or ``randomized`` for full checkpoints.
        dense_extras: What becomes of whole tensors that come with adapters (a trained projector): ``base`` leaves the
            base model's, ``average`` takes their running mean, ``method`` treats matrices named in ``linear`` or in
            ``layers`` as NUFILT does and leaves the rest.
        seed: Of H, together with step and layer.
        init: H by module name for every step from t = 2, (adapter_rank, d_in) each, instead of a seed.

    Source: NUFILT (the paper's Eqs. 5-12, Algorithm 1); specification, section 2, whose decisions this follows.
    """

    NAME: ClassVar[str] = "nufilt"
    OBJECTS: ClassVar[tuple[str, ...]] = ("init",)

    filter_rank: int = 128
    adapter_rank: int = 64
    task_rank: int = 8
    steps: int = 50
    lr: float = 1e-3
    sigma_init: float = 0.02
    solver: Literal["adam", "least_squares"] = "adam"
    filter: bool = True
    layers: Sequence[str] | None = None
    normalize: bool = False
    svd: SvdKind = "exact"
    dense_extras: Literal["base", "average", "method"] = "average"
    seed: int = 42
    init: Sequence[Mapping[str, Tensor]] | None = None

    def check(self) -> None:
        """Raise where an option is out of range."""
        for name in ("filter_rank", "adapter_rank", "task_rank", "steps"):
            check_whole(self.NAME, name, getattr(self, name), at_least=0)
        check_number(self.NAME, "lr", self.lr, "(0, inf)")
        check_number(self.NAME, "sigma_init", self.sigma_init, "(0, inf)")
        check_choice(self.NAME, "solver", self.solver, ("adam", "least_squares"))
        check_switch(self.NAME, "filter", self.filter)
        check_switch(self.NAME, "normalize", self.normalize)
        check_choice(self.NAME, "svd", self.svd, SVD_KINDS)
        check_choice(self.NAME, "dense_extras", self.dense_extras, ("base", "average", "method"))
        check_whole(self.NAME, "seed", self.seed)
        if isinstance(self.layers, str) or (self.layers is not None and not self.layers):
            raise MethodError(
                f"nufilt: layers is {self.layers!r}; expected a list of names or patterns, or None for all."
            )
        if self.layers is not None:
            # A list, as a state file gives it back.
            object.__setattr__(self, "layers", list(self.layers))

    def merge(self, step: Step) -> Merged:
        """Run over all names, one at a time; warn where Adam's eps ruled the solve."""
        if self.variant == "papercode" and step.layers:
            raise MethodError(
                "nufilt: variant 'papercode' has no rank rule, so on adapters (rank-deficient matrices) it depends on "
                "arbitrary vectors. Use variant 'default', or give full checkpoints."
            )
        selected = select(step, self.layers, self.dense_extras == "method")
        weights: dict[str, Weight] = {}
        log: dict[str, Mapping[str, Any]] = {}
        for name in step.watch(step.names, f"{self.NAME}, step {step.t}"):
            if name in selected:
                weights[name], log[name] = self._absorb(step, name)
            elif step.layers and name not in step.layers and self.dense_extras == "average":
                weights[name] = combine(((step.t - 1) / step.t, step.old(name)), (1 / step.t, step.new(name)))
        tiny = [name for name, line in log.items() if line.get("gradient_rms", 1.0) < _TINY_GRADIENT]
        if tiny and not self.normalize:
            warnings.warn(
                f"nufilt, '{step.expert.name}': in {len(tiny)} of {len(log)} layers ('{tiny[0]}', ...) the first "
                f"gradient is below {_TINY_GRADIENT:g} (rms), where Adam's eps of 1e-8 takes over and the adapter "
                "hardly moves. Such task vectors are tiny: use normalize=True.",
                stacklevel=4,
            )
        return Merged(weights, log=log)

    def _absorb(self, step: Step, name: str) -> tuple[Weight, dict[str, Any]]:
        """Return M_t of one selected layer, and its losses and ranks."""
        old, new = step.old(name), step.new(name)
        if step.t == 1:
            masked = self.variant == "papercode" and self.filter
            return (_mask_first(dense(new), self.filter_rank) if masked else combine((1.0, new))), {}
        module = module_of(name)
        layer = prepare(
            old,
            new,
            filter_rank=self.filter_rank,
            task_rank=self.task_rank,
            filtered=self.filter,
            svd=self.svd,
            seed=generator(self.seed, self.NAME, "svd", module, str(step.t)).initial_seed(),
            by_rank=self.variant != "papercode",
        )
        if layer is None:
            return combine((1.0, old), (1.0, new)), {}
        problem = layer.problem
        log: dict[str, Any] = {"filter_rank": problem.Vp.shape[1], "task_rank": problem.Vv.shape[1]}
        adapter: Tensor | None = None
        if self.adapter_rank and not layer.nothing_to_fit:
            if self.solver == "least_squares":
                adapter = solve_least_squares(problem, self.filter)
            else:
                narrow = problem.to(_solve_dtype(new))
                H = self._start(module, problem.K.shape[1], step.t).to(narrow.K)
                found = solve_adam(narrow, H, steps=self.steps, lr=self.lr, normalize=self.normalize)
                adapter = (problem.K @ found.G.to(problem.K)) @ found.H.to(problem.K)
                if self.steps:
                    log["gradient_rms"] = found.gradient_rms
        for when, update in (("before", None), ("after", adapter)):
            stability, plasticity = problem.losses(update)
            log |= {f"stability_{when}": stability, f"plasticity_{when}": plasticity}
            log[f"loss_{when}"] = stability + plasticity
        return layer.fused(adapter), log

    def _start(self, module: str, d_in: int, t: int) -> Tensor:
        """Return H of one layer and step, (adapter_rank, d_in): the given one, or drawn."""
        if self.init is None:
            own = generator(self.seed, self.NAME, module, str(t))
            return self.sigma_init * torch.randn(self.adapter_rank, d_in, generator=own)
        if t - 2 >= len(self.init):
            raise MethodError(
                f"nufilt: init has {len(self.init)} entries, one per step from the second on; step {t} needs "
                f"init[{t - 2}]. Give more, or leave init out and give a seed."
            )
        given = self.init[t - 2]
        key = module if module in given else f"{module}.weight"
        if key not in given:
            raise MethodError(f"nufilt: init[{t - 2}]: {unknown('layer', module, given)}")
        if tuple(given[key].shape) != (self.adapter_rank, d_in):
            raise MethodError(
                f"nufilt: init[{t - 2}]['{key}'] is {tuple(given[key].shape)}; expected (adapter_rank, d_in) = "
                f"({self.adapter_rank}, {d_in})."
            )
        return given[key]

    def notes(self, state: State) -> list[str]:
        """Return how singular vectors and H came about, where that is not the default."""
        notes = []
        if self.svd == "randomized" and any(name not in state.layers for name in state.merged):
            notes.append("Singular vectors of dense matrices are randomised (torch.svd_lowrank, 4 power iterations).")
        if self.init is not None:
            notes.append("The adapters' start H was given, not drawn from the seed.")
        return notes


def select(step: Step, patterns: Sequence[str] | None, extras: bool) -> set[str]:
    """Return the names of a step that NUFILT treats: adapted layers, or weights of linear layers.

    Args:
        step: Its names are chosen from.
        patterns: Module names or patterns (``*fc1``); None for all.
        extras: Whether tensors that come beside adapters are chosen from too.

    Raises:
        TargetError: A pattern fits nothing, or nothing is there to choose from.
        AdapterError: A full checkpoint does not say which modules are linear, and nor does ``patterns``.
    """
    if patterns is None:
        step.check_linear(Nufilt.NAME)
    undeclared = not step.layers and not step.linear
    chosen = [
        name
        for name in step.names
        if step.is_matrix(name)
        and (step.is_linear(name) or undeclared)
        and (name in step.layers or not step.layers or extras)
    ]
    if patterns is not None:
        for pattern in patterns:
            if not any(_fits(name, pattern) for name in chosen):
                raise TargetError(
                    f"nufilt, layers: {unknown('linear layer', pattern, map(module_of, chosen))} Patterns such as "
                    "'*fc1' work too."
                )
        chosen = [name for name in chosen if any(_fits(name, pattern) for pattern in patterns)]
    if not chosen:
        raise TargetError(
            f"nufilt: none of the {len(step.names)} tensors of '{step.expert.name}' is the weight of a linear layer; "
            "there is nothing to filter. Give Adapter(dense=..., linear=[names of the nn.Linear modules])."
        )
    return set(chosen)


def _solve_dtype(new: Weight) -> torch.dtype:
    """Return fp64 for an expert that is held in fp64, else fp32: the paper's, and twice as fast."""
    tensors = (new.A, new.B) if isinstance(new, LowRank) else (new,)
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(module_of(name), module_of(pattern))


def _mask_first(delta: Tensor, filter_rank: int) -> Tensor:
    """Return delta with its first min(r_p, d_out, d_in) input columns zero: delta (I - V V^T), V of a zero matrix."""
    masked = at_least_fp32(delta).clone()
    masked[:, : min(filter_rank, *delta.shape)] = 0
    return masked
