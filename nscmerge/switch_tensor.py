"""One parameter of a frozen base and its updates: biases, norms, embeddings, which no linear layer's product covers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nscmerge.errors import AdapterError


class SwitchTensor:
    """Stands base + scale * delta in for a module's parameter while an update is active; the base is never mutated.

    Args:
        module: Whose parameter it is.
        name: Of the parameter.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._base: nn.Parameter | None = None
        self._deltas: dict[str, Tensor] = {}
        self._now: tuple[str | None, float] = (None, 1.0)

    def add(self, candidate: str, delta: Tensor, tensor: str) -> None:
        """Keep the delta of ``candidate``; ``tensor`` names it in messages.

        Raises:
            AdapterError: Its shape is not the parameter's, or the parameter is quantised.
        """
        like = self._module.get_parameter(self._name)
        if delta.shape != like.shape or not like.is_floating_point():
            raise AdapterError(
                f"tensor '{tensor}' of '{candidate}' is {tuple(delta.shape)}, the base model's {tuple(like.shape)} "
                f"{like.dtype}; an update needs the same shape, and a base that is not quantised there."
            )
        self._deltas[candidate] = delta

    def activate(self, candidate: str | None, scale: float = 1.0) -> None:
        """Put in the sum of base and the candidate's delta; the base itself where it has none, or for None."""
        wanted = (candidate, scale) if candidate in self._deltas else (None, 1.0)
        if wanted == self._now:
            return
        parameters = self._module._parameters
        if self._now[0] is None:
            # Taken now rather than when it was attached: the model may have been moved to a device since.
            self._base = parameters[self._name]
        base = self._base
        assert base is not None  # for the type checker
        self._now = wanted
        if wanted[0] is None:
            parameters[self._name] = base
            return
        delta = self._deltas[wanted[0]].to(base.device)
        total = base.detach().to(torch.promote_types(base.dtype, torch.float32)) + scale * delta
        parameters[self._name] = nn.Parameter(total.to(base.dtype), requires_grad=False)
