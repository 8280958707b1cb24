"""One method over one order: merge, measure, test, note down; and on from where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.continual import ContinualMethod, State
from nscmerge.continual.state import Weight, zero
from nscmerge.continual.surrogates import on_activations, on_subspaces, total
from nscmerge.factors import LowRank
from nscmerge.update import Update
from tasks.continual.record import Row, Run

#: Second moments of a layer's inputs, by task, then by layer.
Moments = Mapping[str, Mapping[str, Tensor]]


def advance(
    run: Run,
    method: ContinualMethod,
    expert: Callable[[str], Adapter],
    score: Callable[[Update, Sequence[str]], Mapping[str, float]],
    save: Callable[[Run], None],
    *,
    losses: bool = True,
    moments: Moments | None = None,
) -> Run:
    """Return the run with all steps done; steps that it has already are merged again, and not tested.

    A step is a pure function, so what is merged again is what was merged before.

    Args:
        run: So far.
        method: As the run names it.
        expert: Gives a task's expert.
        score: Primary metric by task of an update on some tasks.
        save: Called with the run after every step.
        losses: Whether to measure stability and plasticity.
        moments: Second moments of inputs, for the losses on activations, too.
    """
    state: State | None = None
    for t, task in enumerate(run.order, start=1):
        adapter = expert(task)
        old = state
        start = time.perf_counter()
        state = method.start(adapter) if state is None else method.append(state, adapter)
        seconds = time.perf_counter() - start
        if t <= len(run.rows):
            continue
        found = step_losses(old, state, adapter, run.order[:t], moments) if losses else {}
        scores = score(method.update(state), run.order[:t])
        row = Row(task, dict(scores), seconds, parameters(state), found)
        run = replace(run, rows=[*run.rows, row], notes=method.notes(state))
        save(run)
    return run


def parameters(state: State) -> int:
    """Return how many numbers a merge consists of."""
    return sum(w.A.numel() + w.B.numel() if isinstance(w, LowRank) else w.numel() for w in state.merged.values())


def step_losses(
    old: State | None, state: State, expert: Adapter, order: Sequence[str], moments: Moments | None = None
) -> dict[str, float]:
    """Return the stability and plasticity losses of the last step, mean over layers.

    In parameter space, and on activations where second moments are given (``data_stability``, ``data_plasticity``).

    Args:
        old: Before the step; None at the first.
        state: After it.
        expert: That went in.
        order: Tasks up to now, the expert's last.
        moments: By task, then layer.
    """
    names = [name for name, shape in state.shapes.items() if len(shape) == 2]
    on_space, on_data = [], []
    for name in names:
        layer = name in state.layers
        empty = zero(state.shapes[name], layer)
        before = old.weight(name) if old is not None and name in old.shapes else empty
        merged, new = state.weight(name), _of(expert, name, empty)
        on_space.append(on_subspaces(before, merged, new))
        module = name if layer else name.removesuffix(".weight")
        if moments is None or module not in moments[order[-1]]:
            continue
        earlier = [moments[task][module] for task in order[:-1]]
        mean = sum(earlier[1:], earlier[0]) / len(earlier) if earlier else None
        on_data.append(on_activations(before, merged, new, mean, moments[order[-1]][module]))
    found = dict(zip(("stability", "plasticity"), total(on_space), strict=True))
    if moments is not None:
        found |= dict(zip(("data_stability", "data_plasticity"), total(on_data), strict=True))
    return found


def _of(expert: Adapter, name: str, empty: Weight) -> Weight:
    if name in expert.layers:
        return expert.layers[name]
    return expert.dense.get(name, empty)
