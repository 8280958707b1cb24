"""Continual data-free merging: experts come one after another, each is absorbed, and none has to be kept.

    from nscmerge import continual
    method = continual.make("nufilt", filter_rank=64)
    state = method.start(first)
    state = method.append(state, second)
    method.update(state).save("merged")

One file per method. A new one touches its file, its test and one line of :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nscmerge.adapters import Adapter, load_adapter
from nscmerge.continual.adamerging import AdaMerging
from nscmerge.continual.iso_c import IsoC
from nscmerge.continual.kinds import ContinualMethod
from nscmerge.continual.knots_ties import KnotsTies
from nscmerge.continual.lora_wemoe import LoraWemoe
from nscmerge.continual.magmax import MagMax
from nscmerge.continual.nufilt import Nufilt
from nscmerge.continual.opcm import Opcm
from nscmerge.continual.state import Absorbed, State
from nscmerge.continual.task_arithmetic import TaskArithmetic
from nscmerge.continual.ties import Ties
from nscmerge.continual.tsv_m import TsvM
from nscmerge.continual.weight_average import WeightAverage
from nscmerge.continual.wudi import Wudi
from nscmerge.errors import AdapterError, MethodError
from nscmerge.naming import unknown
from nscmerge.update import Update

__all__ = ["METHODS", "Absorbed", "ContinualMethod", "State", "make", "run", "steps"]

METHODS: dict[str, type[ContinualMethod]] = {
    "weight_average": WeightAverage,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "knots_ties": KnotsTies,
    "magmax": MagMax,
    "iso_c": IsoC,
    "tsv_m": TsvM,
    "wudi": Wudi,
    "opcm": Opcm,
    "nufilt": Nufilt,
    "adamerging": AdaMerging,
    "lora_wemoe": LoraWemoe,
}

Adapters = Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path]
#: Name that an adapter made in memory has if nobody gave it one.
_UNNAMED = Adapter.__dataclass_fields__["name"].default


def make(method: str, variant: str = "default", **options: Any) -> ContinualMethod:
    """Return a method with its options.

    Args:
        method: A name in :data:`METHODS`.
        variant: ``default``; ``papercode`` for what produced the printed tables; or a method's own.
        **options: The method's options, checked by name and range.

    Raises:
        MethodError: An unknown name, with the nearest one; or an option out of range.
    """
    if method not in METHODS:
        raise MethodError(unknown("continual method", method, METHODS))
    kind = METHODS[method]
    if variant not in kind.VARIANTS:
        raise MethodError(f"continual method '{method}': {unknown('variant', variant, kind.VARIANTS)}")
    for name in options:
        if name not in kind.option_names():
            raise MethodError(f"continual method '{method}': {unknown('option', name, kind.option_names())}")
    return kind(variant=variant, **options)


def steps(experts: Adapters, method: str, variant: str = "default", **options: Any) -> Iterator[State]:
    """Yield the state after every expert; an expert given as a path is read when its turn comes, and let go of then.

    Args:
        experts: Adapter objects, folders or hub ids in order; a mapping's keys are their names. Adapters made in memory
            without a name are called ``adapter_0``, ``adapter_1``, ... by position.
        method: A name in :data:`METHODS`.
        variant: As in :func:`make`.
        **options: As in :func:`make`.

    Raises:
        AdapterError, ShapeError: An expert cannot be read, or does not fit the others.
        MethodError: As in :func:`make`.
    """
    made = make(method, variant, **options)
    state = None
    for expert in _named(experts):
        state = made.start(expert) if state is None else made.append(state, expert)
        yield state


def run(experts: Adapters, method: str, variant: str = "default", **options: Any) -> list[Update]:
    """Return one update per step, experts in order; arguments and errors as in :func:`steps`.

    Every update holds its own merged weights, so for many full checkpoints use :func:`steps`, one state at a time.
    """
    made = make(method, variant, **options)
    return [made.update(state) for state in steps(experts, method, variant, **options)]


def _named(experts: Adapters) -> Iterator[Adapter]:
    """Load what is a path, each when its turn comes, and give every expert its name."""
    if isinstance(experts, str | Path | Adapter):
        raise AdapterError(f"one {type(experts).__name__} given where a list or a mapping of experts is expected.")
    pairs: list[tuple[str | None, Adapter | str | Path]] = (
        list(experts.items()) if isinstance(experts, Mapping) else [(None, expert) for expert in experts]
    )
    if not pairs:
        raise AdapterError("no expert given; a merge needs one at least. Give folders, hub ids or Adapter objects.")
    for i, (name, expert) in enumerate(pairs):
        if isinstance(expert, str | Path):
            yield load_adapter(expert, name=name)
        elif isinstance(expert, Adapter):
            default = f"{_UNNAMED}_{i}" if expert.name == _UNNAMED else expert.name
            yield replace(expert, name=name if name is not None else default)
        else:
            raise AdapterError(
                f"expert {name or i} is a {type(expert).__name__}; expected an Adapter, a folder or a hub id."
            )
