"""A forward pass that runs to its end although only inner layers are read: what a sharded base needs.

A base that is sharded over processes gathers a block's weights before the block and in the backward pass, by hooks on
what goes in and comes out. A pass cut short leaves them in disorder, and an output that no loss depends on is never
announced to the backward pass. So the pass runs to its end, and what is read is tied to the output, with a gradient of
zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Tie(torch.autograd.Function):
    """Passes ``z`` on, and nothing but zeros back to ``end``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (end,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(end)


def whole_pass(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run the model and return its first output, logits of the last token alone where the model can be told so."""
    known = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    out = model(**inputs, **options)
    end: Tensor = out if isinstance(out, Tensor) else out[0]
    return end


def tie(z: Tensor, end: Tensor) -> Tensor:
    """Return ``z``, (...), on which ``end`` hangs with a gradient of zero; either may be without gradient."""
    tied: Tensor = _Tie.apply(z, end) if z.requires_grad and end.requires_grad else z
    return tied
