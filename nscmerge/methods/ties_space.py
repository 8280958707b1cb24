"""TIES and DARE over named tensors of K tasks, be they whole deltas or components in a common basis, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from nscmerge.methods.ties_steps import (
    Agg,
    Tally,
    disjoint_merge,
    elect_by_signs,
    elect_by_values,
    kept_rank,
    trim_at,
    trim_share,
)
from nscmerge.progress import Watch, quiet
from nscmerge.stack import Stack
from nscmerge.thresholds import kth_magnitudes

#: (task, name, tensor) -> the tensor changed.
Change = Callable[[str, str, Tensor], Tensor]
#: name -> what the K tensors of that name merge to.
Merge = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Space:
    """K tensors under each of many names, made anew whenever they are asked for, so that few lie in memory.

    Args:
        tasks: Names of the K tasks.
        shapes: Names in order, with the shape that the K tensors have.
        tensors: From a name to K fp32 tensors in order of tasks, one at a time; the same numbers at every call.
        watch: Wraps loops over all names.
    """

    tasks: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Callable[[str], Iterable[Tensor]]
    watch: Watch = quiet

    @classmethod
    def of_deltas(cls, stack: Stack) -> Space:
        """Return the space of all dense deltas: layers and whole tensors side by side."""
        shapes: dict[str, tuple[int, ...]] = {name: tuple(deltas[0].shape) for name, deltas in stack.whole.items()}
        shapes |= {name: (experts[0].d_out, experts[0].d_in) for name, experts in stack.layers.items()}
        return cls(tuple(stack.tasks), {name: shapes[name] for name in stack.names}, stack.deltas, stack.watch)

    @classmethod
    def of_whole(cls, stack: Stack) -> Space:
        """Return the space of the whole tensors alone."""
        shapes = {name: tuple(deltas[0].shape) for name, deltas in sorted(stack.whole.items())}
        return cls(tuple(stack.tasks), shapes, stack.deltas, stack.watch)

    def stream(self, label: str) -> Iterable[Iterable[Tensor]]:
        """Return one pass over everything: by name, then by task."""
        return (self.tensors(name) for name in self.watch(self.shapes, label))

    def changed(self, change: Change) -> Space:
        """Return the same space with every tensor passed through ``change`` on its way."""

        def tensors(name: str) -> Iterable[Tensor]:
            return (change(task, name, v) for task, v in zip(self.tasks, self.tensors(name), strict=True))

        return replace(self, tensors=tensors)


def trim_together(space: Space, density: float) -> tuple[Space, dict[str, float]]:
    """Return the space trimmed at one threshold per task over all names, and the thresholds.

    Two passes are made at once, to find the thresholds.
    """
    found = kth_magnitudes(space.stream, len(space.tasks), lambda entries: kept_rank(entries, density))
    thresholds = dict(zip(space.tasks, found, strict=True))
    return space.changed(lambda task, _, v: trim_at(v, thresholds[task])), thresholds


def trim_apart(space: Space, density: float) -> Space:
    """Return the space with every tensor trimmed by itself, to an exact count."""
    return space.changed(lambda _, __, v: trim_share(v, density))


def merge_by_values(space: Space, agg: Agg) -> Merge:
    """Return the merge of the original TIES: election by the sum of values over a trimmed space."""

    @cache
    def majority() -> int:
        signs = 0
        for name in space.shapes:
            total = Tally.of(space.tensors(name)).total
            signs += int((total > 0).sum()) - int((total < 0).sum())
        return signs

    def merge(name: str) -> Tensor:
        tally = Tally.of(space.tensors(name))
        return disjoint_merge(tally, elect_by_values(tally, majority), agg)

    return merge


def merge_by_signs(space: Space, agg: Agg) -> Merge:
    """Return the merge of NSC's released code: election by the sum of signs over a trimmed space."""

    def merge(name: str) -> Tensor:
        tally = Tally.of(space.tensors(name))
        return disjoint_merge(tally, elect_by_signs(tally), agg)

    return merge
