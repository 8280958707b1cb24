"""What every merge returns: one update per layer, where it came from, and the folder that holds both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.errors import AdapterError, MethodError
from nscmerge.factors import LowRank
from nscmerge.folders import new_folder
from nscmerge.lazy import Lazy
from nscmerge.masked import MaskedWeights
from nscmerge.naming import unknown
from nscmerge.peft_format import Kind
from nscmerge.progress import Watch, quiet

if TYPE_CHECKING:
    from nscmerge.precision import Audit

#: Factors or dense deltas by layer (or tensor) name; may be computed, or read, when asked for.
Weights = Mapping[str, LowRank | Tensor]


@dataclass(frozen=True)
class Input:
    """One merged adapter, as the receipt names it: task name, folder or hub id, SHA-256 of its weights."""

    name: str
    source: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, name: str, adapter: Adapter) -> Input:
        """Return the entry of ``adapter`` under its task name; source and hash are None if it was made in memory."""
        return cls(name, adapter.source, adapter.sha256)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How an update was made: all that is needed to make it again.

    Args:
        method: Name of the method or objective.
        variant: ``original`` or ``papercode`` (or a method's own).
        options: All options, defaults included.
        inputs: The merged adapters in order.
        coefficients: Learned lambda by task, then layer; None where the task lacks the layer.
        seed: Seed of everything drawn, None if nothing was.
        seconds: Wall time of the merge, without reading or writing.
        peak_memory_bytes: Largest resident size of the process until then.
        skipped: Tensors that the merge left alone, with the reason.
        relative_error: By layer, |truncated - exact| / |exact| (Frobenius), where a result is truncated.
        notes: Sentences for the receipt and the card.
        extra: Anything else, JSON-able.
    """

    method: str
    variant: str = "original"
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Input] = ()
    coefficients: Mapping[str, Mapping[str, float | None]] | None = None
    seed: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    relative_error: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Update:
    """A merged update of a base model, lambda included.

    Args:
        layers: By module name: factors, or a dense (d_out, d_in) delta where the method is not low-rank.
        dense: Deltas of whole tensors by tensor name.
        base_model: Hub id or path of the base model, None if unknown.
        per_task: For methods that keep per-task weights: by task, then by layer or tensor name.
        recipe: How it was made, None if nobody said.
        kinds: Layers that are embeddings or convolutions.
    """

    layers: Weights
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    per_task: Mapping[str, Weights] = field(default_factory=dict)
    recipe: Recipe | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def delta(self, name: str, task: str | None = None) -> Tensor:
        """Return what the merge adds to a weight, lambda included, in fp32.

        Args:
            name: A layer name, giving (d_out, d_in) (convolution kernels flattened), or a name in ``dense``.
            task: For methods that keep per-task weights, whose; None for the shared update.

        Raises:
            MethodError: A task is given and this merge keeps no weights of it.
            AdapterError: No such layer or tensor; the message names the nearest one.
        """
        found = self.weight(name, task)
        return (found.dense() if isinstance(found, LowRank) else found).to(torch.float32)

    def weight(self, name: str, task: str | None = None) -> LowRank | Tensor:
        """Return factors where the merge has them, else the dense delta; arguments and errors as in :meth:`delta`."""
        self.check_task(task)
        own = [self.per_task[task]] if task is not None else []
        places: list[Weights] = [*own, self.layers, self.dense]
        if (found := next((weights for weights in places if name in weights), None)) is not None:
            return found[name]
        reason = (self.recipe.skipped if self.recipe else {}).get(name)
        known = [known for weights in places for known in weights]
        raise AdapterError(f"'{name}' was skipped: {reason}" if reason else unknown("layer or tensor", name, known))

    def check_task(self, task: str | None) -> None:
        """Raise unless ``task`` is None or one whose weights are kept.

        Raises:
            MethodError: This merge keeps no weights of it.
        """
        if task is None:
            return
        if not self.per_task:
            raise MethodError(
                f"task '{task}' asked for, but this merge is one update for all tasks and keeps no per-task weights. "
                "Leave task out."
            )
        if task not in self.per_task:
            raise MethodError(unknown("task", task, self.per_task))

    def scaled(self, factor: float) -> Update:
        """Return the same update times ``factor``, per-task weights too; the recipe's ``lam`` with it.

        Every method here is linear in lambda, so one merge serves every candidate scale.
        """
        recipe = self.recipe
        if recipe is not None and "lam" in recipe.options:
            recipe = replace(recipe, options={**recipe.options, "lam": factor * recipe.options["lam"]})
        return replace(
            self,
            layers=_scaled(self.layers, factor),
            dense=_scaled(self.dense, factor),
            per_task={task: _scaled(weights, factor) for task, weights in self.per_task.items()},
            recipe=recipe,
        )

    def save(self, folder: str | Path, *, watch: Watch = quiet) -> Path:
        """Write a new merge folder and return its path: adapter or deltas, ``receipt.json``, ``README.md``.

        Low-rank layers become a PEFT adapter; dense layers and tensors go to ``delta.safetensors``, in shards with an
        index where they are many. Each is computed, written and let go of before the next, so memory is a few layers.
        What was written is read back and compared before the folder appears.

        Args:
            folder: Folder to make.
            watch: Wraps the loop over layers, to show progress.

        Raises:
            OutputExistsError: ``folder`` is there already.
            AdapterError: There is nothing to write, or it cannot be written exactly.
        """
        from nscmerge.export import write_update

        with new_folder(folder) as partial:
            write_update(self, partial, watch)
        return Path(folder)

    def fold_into(
        self,
        base: str | Path,
        folder: str | Path,
        *,
        dtype: str | None = None,
        task: str | None = None,
        watch: Watch = quiet,
    ) -> Audit:
        """Write a full checkpoint of base model plus update; see :func:`nscmerge.fold_base.fold_into`."""
        from nscmerge.fold_base import fold_into

        return fold_into(self, base, folder, dtype=dtype, task=task, watch=watch)


def _scaled(weights: Mapping[str, Any], factor: float) -> Mapping[str, Any]:
    if isinstance(weights, MaskedWeights):
        return weights.scaled(factor)

    def scale(name: str) -> LowRank | Tensor:
        weight: LowRank | Tensor = weights[name]
        if isinstance(weight, LowRank):
            return LowRank(weight.A, weight.B, factor * weight.scaling)
        return factor * weight

    return Lazy(list(weights), scale)


def load_update(folder: str | Path) -> Update:
    """Return the update of a merge folder, or of a plain PEFT adapter folder (without a recipe).

    Factors are read now, dense deltas each when asked for: the folder has to stay while the update is used.

    Raises:
        AdapterError: The folder is missing, incomplete or damaged.
    """
    from nscmerge.export import read_update

    return read_update(Path(folder))
