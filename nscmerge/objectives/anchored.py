"""Anchored null-space compression: every task's ratio is drawn to that of its own expert, not below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from nscmerge.batching import Group
from nscmerge.errors import ConfigError
from nscmerge.geometry import residual_ratio, training_ratio
from nscmerge.merged_linear import MergedModel
from nscmerge.objectives.anchors import Anchors, sample_keys, samples_of
from nscmerge.objectives.nsc import NSC
from nscmerge.objectives.ratios import Ratio
from nscmerge.targets import Blocks

Penalty = Literal["hinge", "absolute", "squared"]


class AnchoredNSC(NSC):
    """Mean over tasks of a penalty on the gap omega_k(merged) - omega_k(expert k), both on the same unlabelled inputs.

    Ours, not the paper's: the plain ratio has no bottom, and at ruined merges a task's ratio lies below that of its own
    expert, which is the best that the task is known to do. The expert's ratio is that of the model with adapter k alone
    at coefficient 1; it is measured without gradient, once per sample, and kept by the sample's content.

    A batch's gap is noisy where gaps are small. ``memory`` takes the penalty's slope from the mean over earlier
    batches; the direction is always that of the current batch. The reduction is the mean over a sample's tokens, then
    over samples (:class:`NSC` also knows ``flat``): only a ratio per sample can be kept.

    Args:
        blocks: As for :class:`NSC`.
        projections: As for :class:`NSC`.
        penalty: ``hinge``: max(0, gap), no force once below the expert; ``absolute``: the gap's size, the same force
            from both sides; ``squared``: its square, a force that fades with the gap.
        memory: Weight that earlier gaps keep in their mean from step to step, in [0, 1]: 0 looks at the batch alone,
            0.9 at about the last ten, 1 at all samples seen.
        stop: End the fit once the mean gap (its size; for ``hinge`` its value) of every task that any coefficient can
            move is at most this, after 1 / (1 - memory) steps at least; ``memory`` must lie between 0 and 1. None never
            ends it.
        buckets: As for :class:`NSC`.

    Raises:
        ConfigError: ``memory`` or ``stop`` is out of range, or ``stop`` has no ``memory`` of a few steps to go by.
    """

    #: Training logs the penalty of the gap, validation the gap itself; negative is below the expert.
    quantity = "gap"

    def __init__(
        self,
        blocks: Blocks = "last_quarter",
        projections: list[str] | None = None,
        penalty: Penalty = "hinge",
        memory: float = 0.0,
        stop: float | None = None,
        buckets: int = 1,
    ) -> None:
        super().__init__(blocks, projections, buckets=buckets)
        if not 0 <= memory <= 1:
            raise ConfigError(f"memory is {memory}; it is a weight in [0, 1], 0 for the batch alone.")
        if stop is not None and not stop >= 0:
            raise ConfigError(f"stop is {stop}; it is the largest mean gap that ends the fit, at least 0, or null.")
        if stop is not None and not 0 < memory < 1:
            raise ConfigError(
                f"stop needs the mean over the last batches, and memory is {memory}; set it between 0 and 1, "
                "for example to 0.9."
            )
        self.penalty, self.memory, self.stop = penalty, memory, stop
        self.anchors = Anchors()
        #: By task: remembered sum of gaps over samples, remembered number of samples, number of steps.
        self._sums: dict[str, tuple[float, float, int]] = {}

    def options(self) -> dict[str, Any]:
        """Return the choice of targets, the penalty's options, and where every task stands."""
        options = super().options() | {"penalty": self.penalty, "memory": self.memory, "stop": self.stop}
        return options | {"mean_gap": {task: self.mean_gap(task) for task in self._sums}, "movable": self._movable()}

    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: penalty}`` with gradient; counts the group's gaps, over all processes, into their means."""
        anchors = self._expert_samples(merged, group, training_ratio)
        samples = self.samples(merged, group, training_ratio)
        together = torch.cat(list(samples.values())).detach()
        # One transfer for all tasks, for each waits for the device.
        apart = torch.split(together.cpu().double(), [len(own) for own in samples.values()])
        self._count({task: own - anchors[task] for task, own in zip(samples, apart, strict=True)}, together.device)
        return {task: self._penalised(own.mean(), self.mean_gap(task)) for task, own in samples.items()}

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: gap}`` of the ratios in the reported form, without floor."""
        samples = self.samples(merged, group, residual_ratio)
        anchors = self._expert_samples(merged, group, residual_ratio)
        return {task: (own - anchors[task].to(own)).mean() for task, own in samples.items()}

    def mean_gap(self, task: str) -> float:
        """Return the mean gap of ``task`` as ``memory`` weighs it."""
        gaps, samples, _ = self._sums[task]
        return gaps / samples

    def runs_alike(self) -> bool:
        """False: experts are measured on samples that a process has not met before."""
        return False

    def finished(self) -> str | None:
        """Return why the fit should end now: every task that can be moved is where its expert is."""
        if self.stop is None or not (movable := self._movable()):
            return None
        steps = min(self._sums[task][2] for task in movable)
        if steps * (1 - self.memory) < 1 or any(self._distance(self.mean_gap(task)) > self.stop for task in movable):
            return None
        fixed = [task for task in self._sums if task not in movable]
        return f"{', '.join(movable)} are at their experts' ratio within {self.stop}" + (
            f"; no coefficient moves the ratio of {', '.join(fixed)}" if fixed else ""
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed fit needs to go on exactly: the experts' ratios so far, and the mean gaps."""
        return {"anchors": self.anchors.state(), "sums": dict(self._sums), "live": sorted(self._live)}

    def set_extra_state(self, state: Any) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.anchors.load(state["anchors"])
        self._sums, self._live = dict(state["sums"]), set(state["live"])

    def _distance(self, gap: float) -> float:
        return gap if self.penalty == "hinge" else abs(gap)

    def _penalised(self, omega: Tensor, gap: float) -> Tensor:
        """Penalty of ``gap``, with its slope there times the gradient of ``omega``."""
        if self.penalty == "hinge":
            value, slope = max(0.0, gap), float(gap > 0)
        elif self.penalty == "absolute":
            value, slope = abs(gap), float((gap > 0) - (gap < 0))
        else:
            value, slope = gap**2, 2 * gap
        return value + slope * (omega - omega.detach())

    def _count(self, gaps: Mapping[str, Tensor], device: torch.device) -> None:
        """Add the gaps of samples, fp64 on the CPU, to the mean of their tasks; every process adds those of all."""
        new = torch.zeros(2, len(self._tasks), dtype=torch.float64)
        for task, own in gaps.items():
            k = self._tasks.index(task)
            new[0, k], new[1, k] = own.sum(), len(own)
        # The slope must be one over all processes, or several would not follow the path of one.
        if distributed.is_available() and distributed.is_initialized():
            new = new.to(device)  # where the processes talk
            distributed.all_reduce(new)
        for task, total, count in zip(self._tasks, *new.tolist(), strict=True):
            if count:
                old, samples, steps = self._sums.get(task, (0.0, 0.0, 0))
                self._sums[task] = (self.memory * old + total, self.memory * samples + count, steps + 1)

    def _movable(self) -> list[str]:
        """Tasks met so far whose ratio depends on some coefficient: one of their targets lies behind it."""
        owners = {k for i, t in enumerate(self.targets) if t in self._live for k in self._owners[i].tolist()}
        return [task for task in self._sums if self._tasks.index(task) in owners]

    @torch.no_grad()
    def _expert_samples(self, merged: MergedModel, group: Group, ratio: Ratio) -> dict[str, Tensor]:
        """Return every sample's ratio under its own expert, fp64 on the CPU; measures those not met before."""
        found = {}
        for task, keys in sample_keys(group, ratio.__name__).items():
            if new := [i for i, key in enumerate(keys) if key not in self.anchors]:
                part = samples_of(group, task, [group.rows[task].start + i for i in new])
                with merged.alone(self._tasks.index(task)):
                    values = self.samples(merged, part, ratio)[task].tolist()
                self.anchors.update({keys[i]: value for i, value in zip(new, values, strict=True)})
            found[task] = torch.tensor([self.anchors[key] for key in keys], dtype=torch.float64)
        return found
