"""EMR: elect one unified update, then give every task its own sign mask on it and one rescaler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nscmerge.lazy import Lazy
from nscmerge.masked import MaskedWeights, agreeing
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_choice
from nscmerge.stack import Stack


def emr(stack: Stack, *, lam: float = 1.0, rescale: str = "tensor") -> Merged:
    """Return per-task weights ``lam * rho_k (tau m_k)``, and for no task in particular ``lam * tau``, dense.

    Per entry, g is the sign of the sum of all updates (minus where it is 0), tau = g times the largest magnitude among
    updates of sign g, and m_k keeps where task k's update has sign g. rho_k gives task k back its mean magnitude: the
    sum over tensors of mean|v_k|, over the sum over tensors of mean|tau m_k|; 1 where the mask keeps nothing, since
    there is nothing to rescale. Layers and whole tensors are treated alike.

    Two passes over the layers, each holding a few dense tensors of one layer; no task's dense update is kept. The sum
    that elects is taken in fp64, so that the order of tasks cannot turn a sign.

    Args:
        stack: K adapters; ranks may differ, a missing layer is a zero update.
        lam: Coefficient on all weights, no unit; the method has none of its own, so 1 is its result.
        rescale: ``tensor`` averages magnitudes within each tensor before summing, as the authors' code does; ``global``
            sums over all entries, as their paper writes it. They differ where tensors differ in size.

    Raises:
        MethodError: ``rescale`` is neither.

    Source: Huang et al., arXiv:2405.17461 and its code.
    """
    check_choice("emr", "rescale", rescale, ("tensor", "global"))
    own, kept = [0.0] * len(stack.tasks), [0.0] * len(stack.tasks)
    for name in stack.watch(stack.names, "rescaling"):
        tau = elect(stack.deltas(name))
        count = tau.numel() if rescale == "tensor" else 1
        for k, delta in enumerate(stack.deltas(name)):
            for part, unified in zip(_parts_of(delta), _parts_of(tau), strict=True):
                own[k] += float(part.abs().sum(dtype=torch.float64)) / count
                kept[k] += float(agreeing(part, unified).abs().sum(dtype=torch.float64)) / count
    rescalers = {task: o / m if m else 1.0 for task, o, m in zip(stack.tasks, own, kept, strict=True)}
    shared = _shared(stack, lam)
    per_task = {
        task: MaskedWeights(
            shared,
            {name: experts[k] for name, experts in stack.layers.items() if experts[k].rank},
            {name: deltas[k] for name, deltas in stack.whole.items()},
            rescalers[task],
            flipped=lam < 0,
        )
        for k, task in enumerate(stack.tasks)
    }
    layers, whole = _parts(stack, shared)
    return Merged(layers, whole, per_task, report={"rescalers": rescalers})


def emr_elected(stack: Stack, *, lam: float = 1.0) -> Merged:
    """Return ``lam * tau`` alone, dense: one model for all tasks, without masks and rescalers.

    As the NSC authors' code has it; a sum of exactly 0 counts as plus here, not as minus.

    Args:
        stack: K adapters; ranks may differ, a missing layer is a zero update.
        lam: Merge coefficient, no unit; they search it from 0.1 to 1.

    Source: code of the NSC authors' earlier TARA-Merge, function EMR.
    """
    return Merged(*_parts(stack, _shared(stack, lam, zero_is_plus=True)))


def elect(deltas: Iterator[Tensor], *, zero_is_plus: bool = False) -> Tensor:
    """Return tau (fp32): per entry the largest magnitude among the K deltas that have the elected sign, with that sign.

    The elected sign is that of the sum of all deltas; where the sum is exactly 0 it is minus, or plus on request.
    """
    # Contiguous, or the parts below would be copies instead of views.
    first = next(deltas).contiguous()
    total, up, down = first.double(), first.clamp(min=0), first.clamp(max=0)
    for delta in deltas:
        for sums, high, low, part in zip(*map(_parts_of, (total, up, down, delta)), strict=True):
            sums += part
            torch.maximum(high, part, out=high)
            torch.minimum(low, part, out=low)
    return torch.where(total >= 0 if zero_is_plus else total > 0, up, down)


def _parts_of(tensor: Tensor) -> Sequence[Tensor]:
    """Return parts of 2^18 entries, views of a contiguous tensor, so that temporaries stay in the processor's cache."""
    parts: Sequence[Tensor] = torch.split(tensor.flatten(), 2**18)
    return parts


def _shared(stack: Stack, lam: float, *, zero_is_plus: bool = False) -> Lazy[Tensor]:
    """Return ``lam * tau`` of every layer and whole tensor, each elected when asked for."""
    return Lazy(stack.names, lambda name: lam * elect(stack.deltas(name), zero_is_plus=zero_is_plus))


def _parts(stack: Stack, shared: Mapping[str, Tensor]) -> tuple[Lazy[Tensor], Lazy[Tensor]]:
    """Return (layers, whole tensors) of what is shared."""
    return Lazy(list(stack.layers), shared.__getitem__), Lazy(list(stack.whole), shared.__getitem__)
