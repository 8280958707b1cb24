"""Sum losses while only one of their graphs exists at a time; the sum still carries the whole gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sum_one_by_one(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``losses``, a scalar whose gradient in ``parameters`` is that of the sum.

    Each loss is differentiated, and its graph freed, before the next is asked for; what comes back hangs on the
    parameters alone, by a linear stand-in. So the caller's one ``backward`` remains the only one that a trainer, a
    strategy or a gradient scaler has to know of.

    Args:
        losses: Scalars with gradient, one at least; a generator keeps memory at one graph.
        parameters: Leaves; those that no loss reaches get a gradient of zero.
    """
    gradients = [torch.zeros_like(p) for p in parameters]
    values = []
    for loss in losses:
        new = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [g if n is None else g + n for g, n in zip(gradients, new, strict=True)]
        values.append(loss.detach())
    carrier = torch.stack([(g * p).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
    # The difference first: it is an exact zero, so the value is not rounded.
    return torch.stack(values).sum() + (carrier - carrier.detach())
