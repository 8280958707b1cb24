"""The steps that TIES and DARE are made of, as pure functions of one tensor, or of one tensor per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nscmerge.errors import ShapeError

#: What becomes of the entries that agree in sign: their mean, or their sum.
Agg = Literal["mean", "sum"]
AGGS: tuple[str, ...] = get_args(Agg)

#: Entries looked at together: temporaries stay in the cache, and torch starts no threads, which would have to wait for
#: each other after every operation (up to 17 times slower, measured where other programs used the cores).
_PIECE = 1 << 15


def kept_rank(entries: int, density: float) -> int:
    """Return the rank (1 = smallest magnitude) of the smallest entry that TIES keeps of ``entries``; 0 keeps all.

    N - int(density N), floating error included, so that int(density N) + 1 entries are kept.

    Source: Yadav et al., arXiv:2306.01708, their code's ``topk_values_mask``.
    """
    return entries - int(density * entries) if density < 1 else 0


def trim_at(v: Tensor, threshold: float) -> Tensor:
    """Return ``v`` with entries of magnitude below ``threshold`` set to 0; ``v`` itself for a threshold of 0.

    Args:
        v: fp32.
        threshold: Not negative, and representable in fp32.
    """
    if threshold == 0:
        return v
    # One pass over memory instead of three. hardshrink keeps what lies above its bound: the next number below ours.
    below = torch.nextafter(torch.tensor(threshold, dtype=v.dtype), torch.tensor(0.0, dtype=v.dtype))
    return torch.nn.functional.hardshrink(v, float(below))


def trim_share(v: Tensor, density: float) -> Tensor:
    """Return ``v`` with all but its ``round(density n)`` largest magnitudes (one at least) set to 0, exactly that many.

    ``v`` itself where that is all of it. Of equal magnitudes at the edge those that come first are kept; the authors'
    ``topk`` leaves that open.

    Source: released code of NSC (arXiv:2603.26317), ``Ties``.
    """
    keep = max(1, round(v.numel() * density))
    if keep >= v.numel():
        return v
    magnitudes = v.abs().flatten()
    threshold = magnitudes.kthvalue(len(magnitudes) - keep + 1).values
    mask = magnitudes > threshold
    at_the_edge = (magnitudes == threshold).nonzero().flatten()
    mask[at_the_edge[: keep - int(mask.sum())]] = True
    return torch.where(mask.reshape(v.shape), v, 0.0)


def drop_entries(v: Tensor, keep: Tensor, drop: float) -> Tensor:
    """Return ``v * keep * 1 / (1 - drop)``: what DARE makes of an update, whose expectation is ``v``.

    Args:
        v: One task's tensor, fp32.
        keep: Bool, of the same shape.
        drop: Chance of an entry to be dropped, in [0, 1).

    Source: Yu et al., arXiv:2311.03099.
    """
    return torch.where(keep, v, 0.0).mul_(1 / (1 - drop))


@dataclass(frozen=True, eq=False)
class Tally:
    """Running sums over the tasks, of one shape: all that election and disjoint merge need to know.

    Args:
        total: Sum of all values, added up in the order of tasks.
        positive: Sum of the positive values.
        negative: Sum of the negative values.
        ups: How many values are positive.
        downs: How many are negative.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    ups: Tensor
    downs: Tensor

    def add(self, v: Tensor) -> None:
        """Count one more task in."""
        mine = (self.total, self.positive, self.negative, self.ups, self.downs)
        pieces = zip(*(torch.split(t.view(-1), _PIECE) for t in (*mine, v.contiguous())), strict=True)
        for total, positive, negative, ups, downs, values in pieces:
            total.add_(values)
            positive.add_(values.clamp(min=0))
            negative.add_(values.clamp(max=0))
            ups.add_(values > 0)
            downs.add_(values < 0)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Tally:
        """Return the tally of K tensors of one shape, of which one at a time is held.

        Raises:
            ShapeError: There is none.
        """
        tally = None
        for v in tensors:
            if tally is None:
                counts = (v.new_zeros(v.shape, dtype=torch.int16) for _ in range(2))
                tally = cls(*(v.new_zeros(v.shape) for _ in range(3)), *counts)
            tally.add(v)
        if tally is None:
            raise ShapeError("no task's tensor given; a merge needs one at least.")
        return tally


def elect_by_values(tally: Tally, majority: Callable[[], int]) -> Tensor:
    """Return where the elected sign is +, bool: the sign of the summed values.

    Where the sum is 0 the majority of signs over the whole model decides; if that is 0 too, the sign is -, as in the
    reference (its test is "sign > 0").

    Args:
        tally: Trimmed values.
        majority: The sum of the signs of ``total`` over all entries of all layers; only asked where positive and
            negative values cancel exactly, since counting it takes another pass.

    Source: Yadav et al., arXiv:2306.01708, section 3.2, and their code's ``resolve_zero_signs``.
    """
    tied = (tally.total == 0) & (tally.ups > 0)
    up = tally.total > 0
    return up | tied if bool(tied.any()) and majority() > 0 else up


def elect_by_signs(tally: Tally) -> Tensor:
    """Return where the elected sign is +, bool: the sign of the summed signs, + where they cancel.

    Source: released code of NSC (arXiv:2603.26317), ``Ties``.
    """
    return tally.ups >= tally.downs


def disjoint_merge(tally: Tally, up: Tensor, agg: Agg) -> Tensor:
    """Return the mean (or sum) of the values that have the elected sign; 0 where there is none.

    Args:
        tally: Trimmed values.
        up: Where the elected sign is +, bool.
        agg: ``mean`` divides by how many values agree, ``sum`` does not.

    Source: Yadav et al., arXiv:2306.01708, section 3.2 (mean).
    """
    total = torch.where(up, tally.positive, tally.negative)
    if agg == "sum":
        return total
    return total.div_(torch.where(up, tally.ups, tally.downs).clamp_(min=1))
