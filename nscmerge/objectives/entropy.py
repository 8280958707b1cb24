"""AdaMerging: the entropy of every task's own output on its own inputs (Yang et al., arXiv:2310.02575)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nscmerge.accumulation import sum_one_by_one
from nscmerge.adapters import Adapter
from nscmerge.batching import Group
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.factors import LowRank
from nscmerge.heads import predictions
from nscmerge.merged_linear import MergedModel
from nscmerge.objectives.base import Objective
from nscmerge.objectives.greedy import end_of_answer, greedy_logits, start_decoder

Sum = Callable[[Iterable[Tensor]], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Return H = -sum_c p_c log p_c of p = softmax(logits), (..., C) -> (...), in nats, from 0 to log C.

    Without an epsilon: log p comes from ``log_softmax``, in fp32 at least. A class at -inf has p = 0 and counts
    0 log 0 = 0, with a gradient of 0.
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    p = log_p.exp()
    # Masked before the product: 0 times -inf is not a number, and neither is its gradient.
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


class Entropy(Objective):
    """Layer-wise AdaMerging: the mean entropy of each task's own head on the task's unlabelled inputs.

    Regression has no class probabilities, so a suite with a regression task is refused as a whole. Every task takes a
    full forward pass of its own; in a ``fused`` step classification tasks share one graph. Generated answers run one by
    one, unpadded and without a cache, and each token's graph is freed before the next token's is built: the gradient
    is that of the summed entropies, memory that of one pass.

    Source: Yang et al., arXiv:2310.02575, in the settings of the NSC paper's comparison (AdamW 3e-4, 500 steps, start
    0.4, range free). AdaMerging's own (Adam 1e-3, ``init: 0.3``, ``bounds: [0, 1]``, ``task_reduction: sum``) are
    options here and of ``MergeModule``. We depart from the authors' code where there is nothing to weigh: it has a
    coefficient for every tensor of a full model, adapters have one for every adapted layer.

    Args:
        tasks: One module per task, called as ``task(model, inputs)`` like :class:`tasks.base.Task`; it states
            ``outputs``: ``classes`` for class logits (N, C), ``tokens`` for next-token logits (N, T, V) or (N, V) at
            the last position. They are copied and frozen. A task with ``load_head`` gets the head of its expert.
        mode: For generation: ``first_token``, the entropy of the answer's first token, or ``full_token``, those of all
            steps of the greedy answer, the one that emits the end of the answer included.
        token_reduction: Over the steps of a full answer: their ``sum``, by which long answers count more (published),
            or their ``mean``.
        task_reduction: Over tasks; None takes the published one, ``sum`` where a task generates, else ``mean``.
        max_new_tokens: Steps at most of a full answer.
        eos_token_id: Token or tokens that end an answer; None takes the model's own.
        class_mask: Leave the class that a task never has, its ``mask_class``, out of the entropy. False takes all
            logits of the head, as published.
    """

    quantity = "entropy"

    def __init__(
        self,
        tasks: Mapping[str, nn.Module],
        mode: Literal["first_token", "full_token"] = "first_token",
        token_reduction: Literal["sum", "mean"] = "sum",
        task_reduction: Literal["sum", "mean"] | None = None,
        max_new_tokens: int = 128,
        eos_token_id: int | list[int] | None = None,
        class_mask: bool = False,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; an answer has one token at least.")
        # Copied: heads are loaded into them, and one module may have been given for several tasks.
        # A list: task names may hold dots, which nn.ModuleDict refuses.
        self._heads = nn.ModuleList(copy.deepcopy(task).requires_grad_(False) for task in tasks.values())
        self.tasks = dict(zip(tasks, self._heads, strict=True))
        self._outputs = {name: getattr(task, "outputs", None) for name, task in tasks.items()}
        self.mode, self.token_reduction, self.max_new_tokens = mode, token_reduction, max_new_tokens
        default = "sum" if "tokens" in self._outputs.values() else "mean"
        self.task_reduction = default if task_reduction is None else task_reduction
        self.eos_token_id, self.class_mask = eos_token_id, class_mask
        self._eos: frozenset[int] = frozenset()
        self.eval()

    def train(self, mode: bool = True) -> Entropy:
        """Keep heads in eval mode: no dropout while coefficients are learned."""
        super().train(False)
        return self

    def bind(self, experts: Mapping[str, Adapter]) -> None:
        """Refuse what has no entropy, and load the experts' heads.

        Raises:
            ConfigError: A task's output is not known to be logits, or tasks and experts differ.
            AdapterError: An expert on disk has no head where its task needs one, or another one.
        """
        if values := [name for name, outputs in self._outputs.items() if outputs == "values"]:
            raise ConfigError(
                f"entropy is undefined for regression: the tasks {values} predict values, not probabilities of "
                "classes, so AdaMerging cannot merge this suite. Use nscmerge.objectives.NSC, which does not depend "
                "on what the outputs are, or leave these experts and their data out."
            )
        for name, outputs in self._outputs.items():
            if outputs not in ("classes", "tokens"):
                raise ConfigError(
                    f"task '{name}': {type(self.tasks[name]).__name__}.outputs is {outputs!r}; entropy needs logits. "
                    "State outputs = 'classes' or 'tokens' in that class if they are."
                )
        if set(experts) != set(self.tasks):
            raise ConfigError(
                f"experts and the entropy objective name different tasks: only experts: "
                f"{sorted(set(experts) - set(self.tasks))}, only objective: {sorted(set(self.tasks) - set(experts))}. "
                "Make model.init_args.experts and objective.init_args.tasks equal."
            )
        for name, expert in experts.items():
            _load_head(self.tasks[name], expert, name)

    def runs_alike(self) -> bool:
        """False where answers are followed to their end, which is where they say."""
        return self.mode == "first_token" or "tokens" not in self._outputs.values()

    def prepare(self, model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Find out which tokens end an answer, where answers are generated whole.

        Raises:
            ConfigError: Nobody says which.
        """
        if self.mode == "full_token" and "tokens" in self._outputs.values():
            self._eos = end_of_answer(model, self.eos_token_id)

    def options(self) -> dict[str, Any]:
        """Return the class of every task's head, and what generation and reductions were set to."""
        return {
            "tasks": {name: f"{type(t).__module__}.{type(t).__qualname__}" for name, t in self.tasks.items()},
            "mode": self.mode,
            "token_reduction": self.token_reduction,
            "task_reduction": self.task_reduction,
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": sorted(self._eos),
            "class_mask": self.class_mask,
        }

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum or the mean over tasks."""
        stacked = torch.stack(list(losses))
        return stacked.sum() if self.task_reduction == "sum" else stacked.mean()

    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: entropy}`` with gradient; generated answers with a stand-in for their graphs."""
        return self._means(merged, group, partial(sum_one_by_one, parameters=merged.parameters))

    @torch.no_grad()
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: entropy}``, as it is learned."""
        return self._means(merged, group, lambda entropies: torch.stack(list(entropies)).sum())

    def _means(self, merged: MergedModel, group: Group, add: Sum) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for rows, tasks in group.owners:
            classes = {task: self.tasks[task] for task in tasks if self._outputs[task] == "classes"}
            if classes:
                for task, logits in predictions(merged.model, classes, group.part(rows)):
                    masked = getattr(self.tasks[task], "mask_class", None) if self.class_mask else None
                    means[task] = entropy(_class_logits(logits, task, masked)).mean()
            for task in tasks:
                if task not in classes:
                    samples = [group.part(slice(i, i + 1)) for i in range(rows.start, rows.stop)]
                    answers = [self._answer(merged.model, task, sample, add) for sample in samples]
                    means[task] = torch.stack(answers).mean()
        return {task: means[task] for task in group.rows}

    def _answer(self, model: nn.Module, task: str, sample: Mapping[str, Tensor], add: Sum) -> Tensor:
        """One sample's entropy over the steps of its greedy answer, a scalar."""
        most = self.max_new_tokens if self.mode == "full_token" else 1
        steps = 0

        def entropies() -> Iterator[Tensor]:
            nonlocal steps
            prompt = start_decoder(model, sample)
            for logits in greedy_logits(partial(self._next_logits, model, task), prompt, eos=self._eos, most=most):
                steps += 1
                yield entropy(logits)

        total = add(entropies())
        return total if self.token_reduction == "sum" else total / steps

    def _next_logits(self, model: nn.Module, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.tasks[task](model, inputs)
        if logits.ndim not in (2, 3) or len(logits) != 1:
            raise ConfigError(
                f"task '{task}': its output for one sample is {tuple(logits.shape)}; expected next-token logits, "
                "(1, T, V), or (1, V) at the last position."
            )
        return logits.flatten(0, -2)[-1]


def _class_logits(logits: Tensor, task: str, masked: int | None = None) -> Tensor:
    if logits.ndim != 2 or logits.shape[-1] < 2:
        raise ConfigError(
            f"task '{task}': its output is {tuple(logits.shape)}; entropy needs logits of two classes or more, "
            "(N, C). If the task is no classification, state its outputs as 'values' or 'tokens'."
        )
    if masked is None:
        return logits
    if not 0 <= masked < logits.shape[-1]:
        raise ConfigError(f"task '{task}': mask_class is {masked}; its head has classes 0 to {logits.shape[-1] - 1}.")
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == masked, -math.inf)


def _load_head(task: nn.Module, expert: Adapter, name: str) -> None:
    """Give ``task`` its expert's head; an adapter made in memory may leave the task with the head that it has."""
    load = getattr(task, "load_head", None)
    if load is None:
        return
    if expert.head:
        load(expert.head, name)
    elif task.state_dict() and expert.source is not None:
        raise AdapterError(
            f"expert '{name}' ({expert.source}) has no head, and the entropy of an untrained one means nothing. Give "
            "the folder that 'nscmerge fit' and tasks.finetune.FineTune wrote, with its head.safetensors, or an "
            "Adapter(..., head=...)."
        )
