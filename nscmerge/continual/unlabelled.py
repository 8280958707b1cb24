"""What the methods share that look at a few unlabelled inputs of the new task: the model, the inputs, the entropy."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nscmerge.adapters import Adapter
from nscmerge.batching import MASK, fuse
from nscmerge.continual.kinds import ContinualMethod
from nscmerge.errors import ConfigError, MethodError
from nscmerge.methods.options import check_choice, check_number, check_whole
from nscmerge.naming import unknown
from nscmerge.objectives.entropy import Entropy
from nscmerge.objectives.greedy import DECODER_IDS, start_decoder
from nscmerge.progress import Watch, quiet

Inputs = Mapping[str, Tensor]
#: From a model and inputs to logits.
Head = Callable[[nn.Module, Inputs], Any]
#: Added to probabilities before the logarithm, as in the authors' code.
_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class Unlabelled(ContinualMethod, ABC):
    """A method that lowers the entropy of the new task's own output on unlabelled inputs of that task.

    Args:
        lam: Merge coefficient that it starts from.
        lr: Step size of Adam; 1e-4 for CLIP, 1e-3 for Flan-T5 in the paper.
        steps: Adam steps, one batch each; 50 for CLIP, 100 for Flan-T5 in the paper.
        average: Over a batch, of the samples' ``entropies``, or of their ``logits`` before the entropy is taken, as the
            authors' code has it for generated answers; None for what the task's outputs ask for.
        without_entropy: A task that predicts values has no entropy: ``refuse`` it, or let its expert in at ``start``
            values, with nothing learned.
        model: The base model, which is left as it was. It may be left out where nothing is learned.
        batches: By task name, batches ``{input name: tensor}`` without labels, each step the next one, from the
            beginning again at their end; anything that can be iterated again and again, a data loader too.
        tasks: By task name, a module called as ``task(model, inputs)`` that gives logits and states ``outputs``, like
            :class:`tasks.base.Task`; with ``load_head`` it gets the expert's head. None where the model itself gives
            logits: class logits (N, C), or next-token logits (N, T, V).

    Raises:
        MethodError: An option is out of range.
    """

    OBJECTS: ClassVar[tuple[str, ...]] = ("model", "batches", "tasks")

    lam: float = 0.3
    lr: float = 1e-4
    steps: int = 50
    average: Literal["entropies", "logits"] | None = None
    without_entropy: Literal["refuse", "start"] = "refuse"
    model: nn.Module | None = None
    batches: Mapping[str, Iterable[Inputs]] | None = None
    tasks: Mapping[str, nn.Module] | None = None

    def check(self) -> None:
        """Raise where an option is out of range."""
        super().check()
        check_number(self.NAME, "lr", self.lr, "(0, inf)")
        check_whole(self.NAME, "steps", self.steps, at_least=0)
        if self.average is not None:
            check_choice(self.NAME, "average", self.average, ("entropies", "logits"))
        check_choice(self.NAME, "without_entropy", self.without_entropy, ("refuse", "start"))
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise MethodError(
                f"{self.NAME}: model is a {type(self.model).__name__}; expected a module. "
                "nscmerge.base_model.load_base_model gives one."
            )

    def learns(self, expert: Adapter) -> bool:
        """Return whether anything is learned for an expert: False for values that come in at ``start`` values.

        Raises:
            MethodError: ``tasks`` does not have its task.
        """
        if self.tasks is None:
            return self.steps > 0
        if expert.name not in self.tasks:
            raise MethodError(f"{self.NAME}, tasks: {unknown('task', expert.name, self.tasks)}")
        values = getattr(self.tasks[expert.name], "outputs", None) == "values"
        return self.steps > 0 and not (values and self.without_entropy == "start")

    def lesson(self, expert: Adapter) -> Lesson:
        """Return the new task's inputs and what turns them into an entropy.

        Raises:
            MethodError: There is no model, or nothing about this task.
            ConfigError: The task predicts values and has no entropy, or says nothing about its outputs.
            AdapterError: The task needs a head and the expert has none, or another one.
        """
        head: nn.Module | None = None
        outputs: Any = "classes"
        if self.tasks is not None:
            if self.learns(expert):
                # Copies the task, since a head is loaded into it, and refuses what has no entropy.
                objective = Entropy({expert.name: self.tasks[expert.name]})
                objective.bind({expert.name: expert})
                head = objective.tasks[expert.name]
            else:
                head = copy.deepcopy(self.tasks[expert.name]).requires_grad_(False).eval()
            outputs = getattr(head, "outputs", None)
        if self.model is None or self.batches is None:
            missing = [name for name in ("model", "batches") if getattr(self, name) is None]
            raise MethodError(
                f"{self.NAME} learns from unlabelled inputs of '{expert.name}' and has no {' and no '.join(missing)}. "
                f"Give make('{self.NAME}', model=<base model>, batches={{task: [inputs, ...]}}); methods that need "
                "neither are 'nufilt', 'opcm' and others."
            )
        if expert.name not in self.batches:
            raise MethodError(f"{self.NAME}, batches: {unknown('task', expert.name, self.batches)}")
        average = self.average or ("logits" if outputs == "tokens" else "entropies")
        return Lesson(expert.name, self.model, self.batches[expert.name], head, average)


@dataclass(frozen=True, eq=False)
class Lesson:
    """The unlabelled inputs of one task, and what turns them into an entropy.

    Args:
        task: Its name.
        model: Base model, with the merge running in it while losses are taken.
        batches: Inputs.
        head: Gives logits; None for the model itself.
        average: As in :class:`Unlabelled`.
    """

    task: str
    model: nn.Module
    batches: Iterable[Inputs]
    head: Head | None
    average: str

    def once(self, most: int) -> Iterator[dict[str, Tensor]]:
        """Yield the first ``most`` batches, each at most once, on the model's device.

        Raises:
            ConfigError: There is none, or one holds labels or is no batch of tensors.
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        empty = True
        for batch in islice(self.batches, most):
            empty = False
            (group,) = fuse({self.task: batch})
            yield {name: value.to(device) for name, value in group.inputs.items()}
        if most and empty:
            raise ConfigError(
                f"task '{self.task}': its batches are empty, or can be read only once; give a list of batches, or a "
                "data loader."
            )

    def endless(self, steps: int) -> Iterator[dict[str, Tensor]]:
        """Yield ``steps`` batches, from the beginning again at their end; errors as in :meth:`once`."""
        while steps > 0:
            for batch in self.once(steps):
                yield batch
                steps -= 1

    def entropy(self, run: Head, inputs: Inputs) -> Tensor:
        """Return the entropy of one batch, a scalar with gradient.

        Args:
            run: Gives what the model or head gives, while the merge is in place: ``run(model, inputs)``.
            inputs: One batch.

        Raises:
            ConfigError: There are no logits of two classes or more.
        """
        found = run(self.model, inputs)
        logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(found).__name__
            raise ConfigError(
                f"task '{self.task}': the output is {got}; entropy needs logits, (N, C) or (N, T, V), of two classes "
                "or more. Give tasks={name: module} where the model alone does not give them."
            )
        logits = first_token(logits, start_decoder(self.model, inputs))
        return entropy(logits.mean(0, keepdim=True) if self.average == "logits" else logits)

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        """Return what the head, or the model itself, gives."""
        inputs = start_decoder(model, inputs)
        return model(**inputs) if self.head is None else self.head(model, inputs)

    def learn(
        self,
        parameters: Sequence[nn.Parameter],
        run: Head,
        *,
        steps: int,
        lr: float,
        watch: Watch = quiet,
        label: str = "learning",
    ) -> tuple[float | None, float | None]:
        """Change ``parameters`` in place by Adam steps; return the first batch's entropy before and after, in nats.

        Args:
            parameters: What is learned.
            run: As in :meth:`entropy`.
            steps: How many; 0 leaves everything as it is.
            lr: Step size.
            watch: Wraps the loop over steps.
            label: Says what it does.
        """
        if not steps:
            return None, None
        optimizer = torch.optim.Adam(parameters, lr=lr)
        before: float | None = None
        for inputs in watch(self.endless(steps), label):
            loss = self.entropy(run, inputs)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            before = float(loss.detach()) if before is None else before
        with torch.no_grad():
            (first,) = self.once(1)
            return before, float(self.entropy(run, first))


def entropy(logits: Tensor) -> Tensor:
    """Return the mean over rows of -sum_c p_c log(p_c + 1e-8), a scalar in nats, of logits (N, C); in fp32 at least."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return -(p * (p + _EPS).log()).sum(-1).mean()


def first_token(logits: Tensor, inputs: Inputs) -> Tensor:
    """Return the logits of an answer's first token, (N, V), of (N, T, V): at the last token that is no padding.

    Logits (N, C) come back as they are.
    """
    if logits.ndim == 2:
        return logits
    mask = inputs.get(MASK)
    if DECODER_IDS in inputs or mask is None or mask.shape != logits.shape[:2]:
        return logits[:, -1]
    places = torch.arange(mask.shape[1], device=logits.device)
    last = (mask.bool() * places).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last]


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """Run with a model in eval mode, frozen, and with gradients switched on for others; all is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)
