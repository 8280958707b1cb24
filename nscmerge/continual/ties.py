"""TIES on the pair (merge so far, new expert), recursively."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nscmerge.continual.algebra import combine, dense
from nscmerge.continual.checks import Step
from nscmerge.continual.kinds import ContinualMethod, Merged
from nscmerge.continual.state import State, Weight
from nscmerge.methods.options import check_choice, check_number
from nscmerge.methods.ties_space import Merge, Space, merge_by_values
from nscmerge.methods.ties_steps import AGGS, Agg, kept_rank
from nscmerge.thresholds import kth_magnitudes


@dataclass(frozen=True, kw_only=True)
class Ties(ContinualMethod):
    """M_1 = lam delta_1; then M_t = M_{t-1} + lam u, u the TIES vector of M_{t-1} and delta_t. Dense from t = 2.

    N counts every tensor that an expert has: for adapters the adapted layers, unless zero deltas of the others are
    given (``dense``), as for parity with code that counts the frozen part of the model too.

    Each of the two is trimmed at one threshold over all tensors (int(density N) + 1 entries stay), signs are elected by
    the sum of values, entries that agree are summed. Large entries of M feed themselves, by 1 + lam a step.

    ``text_recursion`` merges delta_t with the previous TIES vector (delta_1 at first) instead of M_{t-1}, as the text
    of the NUFILT paper says. ``papercode`` loses the first expert (M_1 = 0), as the code behind the Flan-T5 table.

    Args:
        lam: Merge coefficient, no unit; the paper has 0.3 for 8 tasks, 0.1 for 14 and 20.
        density: Share of entries that each of the two keeps, in (0, 1].
        agg: ``sum`` of the entries that agree, or their ``mean``.

    Source: Yadav et al., arXiv:2306.01708; specification, section 3.3.
    """

    NAME: ClassVar[str] = "ties"
    VARIANTS: ClassVar[tuple[str, ...]] = ("default", "papercode", "text_recursion")

    lam: float = 0.3
    density: float = 0.2
    agg: Agg = "sum"

    def check(self) -> None:
        """Raise where an option is out of range."""
        super().check()
        check_number(self.NAME, "density", self.density, "(0, 1]")
        check_choice(self.NAME, "agg", self.agg, AGGS)

    def merge(self, step: Step) -> Merged:
        """Return M_t, and for ``text_recursion`` the TIES vector."""
        by_text = self.variant == "text_recursion"
        if step.t == 1:
            lam = 0.0 if self.variant == "papercode" else self.lam
            first: dict[str, Weight] = {name: combine((lam, step.new(name))) for name in step.names}
            return Merged(first, tensors={name: dense(step.new(name)) for name in step.names} if by_text else {})
        merge = ties_vector(step, step.state.tensors if by_text else None, self.density, self.agg)
        weights: dict[str, Weight] = {}
        vectors: dict[str, Tensor] = {}
        for name in step.watch(step.names, f"{self.NAME}, step {step.t}"):
            u = merge(name)
            weights[name] = dense(step.old(name)) + self.lam * u
            if by_text:
                vectors[name] = u
        return Merged(weights, tensors=vectors)

    def notes(self, state: State) -> list[str]:
        """Return that layers are dense."""
        dense_now = [name for name in state.layers if isinstance(state.weight(name), Tensor)]
        return ["TIES elects entry by entry, so layers are dense from the second expert on."] if dense_now else []


def ties_vector(step: Step, previous: Mapping[str, Tensor] | None, density: float, agg: Agg) -> Merge:
    """Return the TIES merge of two vectors over all tensors of a step, by name, computed when asked for.

    Args:
        step: Its expert is the second vector.
        previous: The first vector by name; None for the merge so far.
        density: Share of entries kept.
        agg: ``sum`` or ``mean``.
    """

    def pair(name: str) -> list[Tensor]:
        new = dense(step.new(name))
        old = dense(step.old(name)) if previous is None else previous.get(name, torch.zeros_like(new))
        return [old, new]

    tasks = ("merge so far", "new expert")
    space = Space(tasks, step.shapes, pair, step.watch)
    # Bit patterns of fp32 are compared; rounding keeps the order, so wider tensors are trimmed after rounding.
    thresholds = kth_magnitudes(space.stream, 2, lambda entries: kept_rank(entries, density))
    by_task = dict(zip(tasks, thresholds, strict=True))
    trimmed = space.changed(lambda task, _, v: torch.where(v.to(torch.float32).abs() >= by_task[task], v, 0.0))
    return merge_by_values(trimmed, agg)
