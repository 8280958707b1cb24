"""Null-space compression: the mean null-space ratio of every task's own adapter on its own inputs (Eqs. 4-5 of NSC)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nscmerge.batching import MASK, Group, by_length
from nscmerge.errors import ConfigError, TargetError
from nscmerge.factors import LowRank
from nscmerge.geometry import residual_ratio, row_space, training_ratio
from nscmerge.merged_linear import MergedModel
from nscmerge.objectives.base import Objective
from nscmerge.objectives.greedy import DECODER_IDS, end_of_answer, start_decoder
from nscmerge.objectives.positions import Position, own_width, token_weights, with_answers
from nscmerge.objectives.ratios import Basis, Ratio, Weight, rows_of, sample_ratios
from nscmerge.targets import Blocks, select_targets

#: ``{layer: z}``, inputs of the target layers.
Captured = Mapping[str, Tensor]
Places = slice | Tensor


class NSC(Objective):
    """The published objective, exactly: plain mean null-space ratio, unbounded below.

    Args:
        blocks: Blocks whose layers are targets: ``last_quarter``, a number of last blocks, or a list of indices.
        projections: Exact projection names; None takes the attention's output projection, else the value projection.
        reduction: Mean over tokens per sample and then over samples, or over all tokens pooled (spec 3.3).
        buckets: Run a step's samples, sorted by length, in so many passes instead of one. Same numbers within rounding;
            on a CPU less time where lengths differ, as padding is computed, too.
        position: Which forward passes count where answers are generated. ``first_token``: the pass over the prompt, all
            that other models have; its cost does not depend on the answer. ``last_token``: the last pass of the greedy
            answer, over the prompt and all answer tokens but the last. ``full_sequence``: the mean over all passes of
            the answer; of a causal model one pass gives it exactly, with a weight for every token.
        max_new_tokens: Tokens at most of an answer.
        eos_token_id: Token or tokens that end an answer; None takes the model's own.
        mask_padding: Leave padding out of the mean over tokens. False counts that of a task's own batch, as the
            authors' program does; ``reduction``, ``buckets`` and ``position`` then stay at their defaults.

    Raises:
        ConfigError: An option is out of range, or two of them do not go together.
    """

    def __init__(
        self,
        blocks: Blocks = "last_quarter",
        projections: list[str] | None = None,
        reduction: Literal["sample", "flat"] = "sample",
        buckets: int = 1,
        position: Position = "first_token",
        max_new_tokens: int = 128,
        eos_token_id: int | list[int] | None = None,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if buckets < 1:
            raise ConfigError(f"buckets is {buckets}; a step takes one pass at least.")
        if buckets > 1 and reduction == "flat":
            raise ConfigError("buckets needs reduction 'sample': pooled tokens are weighed over a whole batch.")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; an answer has one token at least.")
        for name, plain in {"position": position == "first_token", "mask_padding": mask_padding}.items():
            if not plain and (buckets > 1 or reduction == "flat"):
                raise ConfigError(f"this {name} needs buckets 1 and reduction 'sample': it weighs a sample's tokens.")
        if position != "first_token" and not mask_padding:
            raise ConfigError(f"position {position} runs samples without padding; leave mask_padding at true.")
        self.blocks, self.projections, self.reduction, self.buckets = blocks, projections, reduction, buckets
        self.position, self.max_new_tokens, self.mask_padding = position, max_new_tokens, mask_padding
        self.eos_token_id = eos_token_id
        self._eos: frozenset[int] = frozenset()
        self.targets: list[str] = []
        self._tasks: list[str] = []
        self._live: set[str] = set()  # targets that lie behind some coefficient, as far as seen
        # Parameters, not buffers: DDP broadcasts buffers before every forward pass.
        self._rows, self._owners = nn.ParameterList(), nn.ParameterList()
        self._spans: list[dict[int, slice]] = []  # by target: which of its rows are whose

    def prepare(self, model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Select the target layers and compute every task's row space there, once, fp64 SVD stored in fp32.

        Raises:
            TargetError: No layer is selected, or some task's adapter has none of the selected ones.
            ConfigError: Answers are generated, and nobody says which token ends one.
        """
        if self.position != "first_token":
            self._eos = end_of_answer(model, self.eos_token_id)
        layers = {layer for expert in experts.values() for layer in expert}
        self.targets = select_targets(model, layers, self.blocks, self.projections)
        self._tasks = list(experts)
        for task, expert in experts.items():
            if not any(t in expert for t in self.targets):
                raise TargetError(
                    f"the adapter of '{task}' has none of the target layers {_shorten(self.targets)}; its ratio is "
                    "undefined. Choose blocks and projections that every adapter has."
                )
        for target in self.targets:
            spaces = {k: row_space(e[target].A) for k, e in enumerate(experts.values()) if target in e}
            owners = torch.tensor([k for k, rows in spaces.items() for _ in rows], dtype=torch.long)
            ends = list(itertools.accumulate(map(len, spaces.values())))
            self._spans.append({k: slice(e - len(s), e) for (k, s), e in zip(spaces.items(), ends, strict=True)})
            rows = torch.cat(list(spaces.values())).float()
            self._rows.append(nn.Parameter(rows, requires_grad=False))
            self._owners.append(nn.Parameter(owners.to(rows.device), requires_grad=False))

    def options(self) -> dict[str, Any]:
        """Return block and projection choice, reduction, and the target layers that came of them."""
        return {
            "blocks": self.blocks,
            "projections": self.projections,
            "reduction": self.reduction,
            "buckets": self.buckets,
            "position": self.position,
            "max_new_tokens": self.max_new_tokens if self.position != "first_token" else 1,
            "eos_token_id": sorted(self._eos),
            "mask_padding": self.mask_padding,
            "targets": self.targets,
        }

    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` with gradient from one truncated forward pass over the fused group."""
        return {task: omega.mean() for task, omega in self.samples(merged, group, training_ratio).items()}

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: Omega}`` in the reported form, without floor."""
        return {task: omega.mean() for task, omega in self.samples(merged, group, residual_ratio).items()}

    def samples(self, merged: MergedModel, group: Group, ratio: Ratio) -> dict[str, Tensor]:
        """Return ``{task: Omega of each of its samples}`` for the task's own adapter, by truncated forward passes.

        A row that several tasks share runs once and counts for each of them.
        """
        of_part = self._shared_ratios if group.shared else self._own_ratios
        lengths = None
        if self.position != "first_token":
            group, lengths = with_answers(merged.model, group, self._eos, self.max_new_tokens, together=merged.together)
        parts = []
        for rows, inputs in by_length(group, self.buckets):
            captured = merged.capture(start_decoder(merged.model, inputs), self.targets)
            self._live.update(target for target, z in captured.items() if z.requires_grad)
            mask: Weight = inputs[MASK].bool() if group.mask is not None else None
            if lengths is not None:
                mask = {t: self._token_weights(merged, t, z, lengths) for t, z in captured.items()}
            elif not self.mask_padding:
                mask = own_width(group)
            # A part sorted by length may hold nothing of some task.
            places = {t: own for t, r in group.rows.items() if _count(own := _places(rows, r))}
            parts.append((rows, places, of_part(captured, mask, places, ratio)))
        if len(parts) == 1:
            return parts[0][2]
        whole = {}
        for task in group.rows:
            mine = [(rows[places[task]], omega[task]) for rows, places, omega in parts if task in places]
            order = torch.cat([rows for rows, _ in mine]).argsort()
            whole[task] = torch.cat([omega for _, omega in mine])[order]
        return whole

    def _own_ratios(
        self, captured: Captured, mask: Weight, places: Mapping[str, Places], ratio: Ratio
    ) -> dict[str, Tensor]:
        """Return every task's ratios where each row has one task: one product with all row spaces serves them all.

        Args:
            captured: Inputs of the target layers, n rows.
            mask: As for :func:`sample_ratios`.
            places: Which of the n rows are whose.
            ratio: As for :func:`sample_ratios`.
        """
        z = next(iter(captured.values()))
        task_of = torch.empty(len(z), dtype=torch.long)
        for task, own in places.items():
            task_of[own] = self._tasks.index(task)
        bases = {t: Basis(self._rows[i], self._owners[i]) for i, t in enumerate(self.targets)}
        omega = sample_ratios(captured, task_of.to(z.device), bases, mask, reduction=self.reduction, ratio=ratio)
        return {task: omega[own] for task, own in places.items()}

    def _shared_ratios(
        self, captured: Captured, mask: Weight, places: Mapping[str, Places], ratio: Ratio
    ) -> dict[str, Tensor]:
        """As :meth:`_own_ratios`, where rows have several tasks: each task reads its rows of what all captured."""
        found = {}
        for task, own in places.items():
            k = self._tasks.index(task)
            bases = {t: self._basis(i, k) for i, t in enumerate(self.targets) if k in self._spans[i]}
            seen = {t: captured[t][own] for t in bases}
            z = next(iter(seen.values()))
            owner = torch.zeros(len(z), dtype=torch.long, device=z.device)
            valid = rows_of(mask, own)
            found[task] = sample_ratios(seen, owner, bases, valid, reduction=self.reduction, ratio=ratio)
        return found

    def _token_weights(
        self, merged: MergedModel, target: str, z: Tensor, lengths: Mapping[str, list[tuple[int, int]]]
    ) -> Tensor:
        """Return how much every token counts at one target, (N, T); ``z`` is its input, (N, T, d_in)."""
        names = list(lengths)
        if len(names) > 1:
            # Encoder and decoder run along tokens of their own.
            decoder = merged.model.get_decoder()  # type: ignore[operator]
            inside = any(module is merged.layers[target] for module in decoder.modules())
            names = [name for name in names if (name == DECODER_IDS) == inside]
        prompts = lengths[names[0]]
        width = max(prompt + steps - 1 for prompt, steps in prompts)
        if z.ndim != 3 or z.shape[1] != width:
            raise TargetError(
                f"target layer '{target}' sees {tuple(z.shape)}, where the tokens are ({len(prompts)}, {width}); "
                f"position {self.position} weighs tokens one by one. Choose targets that see all tokens, or "
                "first_token."
            )
        return token_weights(prompts, width, self.position, z.device)

    def _basis(self, target: int, task: int) -> Basis:
        """One task's row space at a target, its rows numbered as if there were no other task."""
        rows = self._rows[target][self._spans[target][task]]
        return Basis(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))


def _places(rows: Tensor, own: slice) -> Places:
    """Return where in ``rows`` those of ``own`` stand; a slice, which copies nothing, where ``rows`` count up by 1."""
    if bool((rows.diff() == 1).all()):
        start, stop = (min(max(end - int(rows[0]), 0), len(rows)) for end in (own.start, own.stop))
        return slice(start, stop)
    found: Tensor = ((rows >= own.start) & (rows < own.stop)).nonzero().flatten()
    return found


def _count(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
