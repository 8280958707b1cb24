"""FR-Merging: the updates' sum through a filter on its two-dimensional spectrum. FREE adds a sparse expert per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nscmerge.errors import MethodError
from nscmerge.lazy import Lazy
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_number, check_switch
from nscmerge.stack import Stack

#: (squared distances of bins to the highest frequency, min(H, W)) -> weights of the bins.
Keep = Callable[[Tensor, int], Tensor]
#: Mean magnitudes below this share of what they came from are rounding noise of an fp32 transform.
NOISE = 1e-6


def free_merging(
    stack: Stack,
    *,
    lam: float = 1.0,
    ratio: float = 0.70,
    overlap: bool = True,
    align: bool = False,
    expert_share: float = 0.0,
) -> Merged:
    """Return ``lam * sum_k Re ifft2(w fft2(delta_k))`` of every matrix, dense; with experts per-task weights too.

    The spectrum is not shifted, so a bin's distance to (H // 2, W // 2) is its distance to the highest frequency: kept,
    with w = 1, is a disc of radius ``ratio * min(H, W)`` around that, a high-pass filter. The filter is linear, so the
    sum of all deltas goes through it once. Tensors that are no matrix are summed unfiltered; convolution kernels of
    adapters are matrices (d_out, d_in).

    With ``expert_share`` = q, task k has weights of its own: the shared ones plus ``lam mu_k e_k``. e_k holds the
    ``int(q d_in)`` largest entries of each row of its delta, none where d_in < 1 / q, and
    ``mu_k = -log10(q) (mean|e_k| / q) / mean|v_k|`` with v_k its filtered (and aligned) delta, each a mean over tensors
    of the tensor's own mean. Which task it is must be known at inference; FREE trains a router for that, which is no
    part of a merge.

    Computed in fp32, which errs by 2e-7 of the largest entry against fp64 at 4096 x 4096, in a third of the time.

    Args:
        stack: K adapters; ranks may differ, a missing layer is a zero update.
        lam: Merge coefficient, no unit; it multiplies the experts too.
        ratio: Radius of the disc over min(H, W), in (0, 1]; the authors use 0.6 to 0.9.
        overlap: Bins at a distance of exactly ``min(H, W) // 10`` count twice: two masks of the authors' code share
            that circle.
        align: Multiply each task's filtered tensor by ``max_j mean|v_j| / mean|v_k|``, tensor by tensor, so that all
            tasks weigh the same in it. As in the authors' code; their paper weights whole tasks.
        expert_share: Share q of each row that an expert keeps, in [0, 1); 0 for no experts. The authors use 0.01.

    Raises:
        MethodError: An option is out of range, or ``expert_share`` keeps no entry of any row.

    Source: Zheng and Wang, arXiv:2411.16815 and its code.
    """
    check_number("free_merging", "ratio", ratio, "(0, 1]")
    check_number("free_merging", "expert_share", expert_share, "[0, 1)")
    check_switch("free_merging", "overlap", overlap)
    check_switch("free_merging", "align", align)

    def keep(distance: Tensor, side: int) -> Tensor:
        # Squares of whole numbers; 1e-12 lets 0.7 * 90 reach 63, as the authors' fp32 comparison does.
        kept = (distance <= (ratio * side) ** 2 * (1 + 1e-12)).float()
        return kept + (distance == (side // 10) ** 2).float() if overlap else kept

    def unit(name: str) -> Tensor:
        weights = half_spectrum(_shape(stack, name), keep)
        factors = _alignment(_magnitudes(stack, name, weights)) if align else [1.0] * len(stack.tasks)
        return filtered(_weighted_sum(stack, name, factors), weights)

    if not expert_share:
        return _shared(stack, unit, lam)
    scales = _expert_scales(stack, keep, align, expert_share)

    def own(k: int) -> Lazy[Tensor]:
        return Lazy(stack.names, lambda name: lam * (unit(name) + scales[k] * _expert(stack, name, k, expert_share)))

    merged = _shared(stack, unit, lam)
    return Merged(
        merged.layers,
        merged.whole,
        {task: own(k) for k, task in enumerate(stack.tasks)},
        report={
            "expert_scales": dict(zip(stack.tasks, scales, strict=True)),
            "too_narrow_for_experts": [name for name in stack.names if not int(expert_share * _width(stack, name))],
        },
    )


def free_merging_low_pass(stack: Stack, *, lam: float = 1.0, low_ratio: float = 0.10) -> Merged:
    """Return ``lam * sum_k Re ifft2(w fft2(delta_k))`` with the highest frequencies removed instead of kept, dense.

    As the NSC authors' code has it: bins closer to the highest frequency than ``max(1, int(low_ratio * min(H, W)))``
    go, the rest stay. Its second ratio, 0.70, parts two bands that both stay, and has no effect.

    Args:
        stack: K adapters; ranks may differ, a missing layer is a zero update.
        lam: Merge coefficient, no unit.
        low_ratio: Radius of the removed disc over min(H, W), in [0, 1].

    Raises:
        MethodError: ``low_ratio`` is out of range.

    Source: code of the NSC authors' earlier TARA-Merge, function FreeMerge, mode "band+high".
    """
    check_number("free_merging", "low_ratio", low_ratio, "[0, 1]")

    def keep(distance: Tensor, side: int) -> Tensor:
        return (distance >= max(1, int(low_ratio * side)) ** 2).float()

    def unit(name: str) -> Tensor:
        weights = half_spectrum(_shape(stack, name), keep)
        return filtered(_weighted_sum(stack, name, [1.0] * len(stack.tasks)), weights)

    return _shared(stack, unit, lam)


def half_spectrum(shape: Sequence[int], keep: Keep) -> Tensor | None:
    """Return the weights (H, W // 2 + 1) of a real matrix's half spectrum, fp32; None where there is no matrix.

    Each is the mean of w at a bin and at its mirror image (-i, -j). The two differ where H or W is odd, and then the
    real part of the inverse transform takes their mean.
    """
    if len(shape) != 2 or not min(shape):
        return None
    height, width = shape

    def weights(i: Tensor, j: Tensor) -> Tensor:
        distance = ((i - height // 2) ** 2)[:, None] + ((j - width // 2) ** 2)[None, :]
        return keep(distance, min(shape))

    rows, columns = torch.arange(height), torch.arange(width // 2 + 1)
    if height % 2 == width % 2 == 0:
        return weights(rows, columns)
    return (weights(rows, columns) + weights(-rows % height, -columns % width)) / 2


def filtered(delta: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``Re ifft2(w fft2(delta))`` of a matrix (H, W) in fp32; without weights, ``delta`` itself."""
    if weights is None:
        return delta
    spectrum = torch.fft.rfft2(delta.float()).mul_(weights.to(delta.device))
    result: Tensor = torch.fft.irfft2(spectrum, s=delta.shape)
    return result


def sparse(delta: Tensor, share: float) -> Tensor:
    """Return ``delta`` with the ``int(share * n)`` largest magnitudes of each row of n entries, else 0."""
    if not delta.ndim or not (count := int(share * delta.shape[-1])):
        return torch.zeros_like(delta)
    places = delta.abs().topk(count, dim=-1).indices
    return torch.zeros_like(delta).scatter(-1, places, delta.gather(-1, places))


def _shared(stack: Stack, unit: Callable[[str], Tensor], lam: float) -> Merged:
    """Return ``lam * unit(name)`` of every layer and whole tensor, each computed when asked for."""

    def compute(name: str) -> Tensor:
        return lam * unit(name)

    return Merged(Lazy(list(stack.layers), compute), Lazy(list(stack.whole), compute))


def _weighted_sum(stack: Stack, name: str, factors: Sequence[float]) -> Tensor:
    deltas = stack.deltas(name)
    total = factors[0] * next(deltas)
    for factor, delta in zip(factors[1:], deltas, strict=True):
        total.add_(delta, alpha=factor)
    return total


def _magnitudes(stack: Stack, name: str, weights: Tensor | None) -> list[float]:
    """Return every task's mean|v_k| of one tensor, v_k its filtered delta; 0 where only rounding is left of it."""
    means = []
    for delta in stack.deltas(name):
        mean = _mean(filtered(delta, weights))
        means.append(mean if mean > NOISE * _mean(delta) else 0.0)
    return means


def _mean(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64)) / max(tensor.numel(), 1)


def _alignment(magnitudes: Sequence[float]) -> list[float]:
    """Return max_j m_j / m_k of every task; 1 where m_k is 0."""
    return [max(magnitudes) / m if m else 1.0 for m in magnitudes]


def _expert_scales(stack: Stack, keep: Keep, align: bool, share: float) -> list[float]:
    """Return mu_k of every task; 0 where its filtered deltas are 0."""
    widest = max(_width(stack, name) for name in stack.names)
    if not int(share * widest):
        raise MethodError(
            f"free_merging: expert_share is {share!r}, which keeps int({share!r} * {widest}) = 0 entries of the widest "
            f"row; expected at least {1 / widest:.2g}, or 0 for no experts."
        )
    whole, kept = [0.0] * len(stack.tasks), [0.0] * len(stack.tasks)
    for name in stack.watch(stack.names, "weighing experts"):
        magnitudes = _magnitudes(stack, name, half_spectrum(_shape(stack, name), keep))
        factors = _alignment(magnitudes) if align else [1.0] * len(magnitudes)
        for k, delta in enumerate(stack.deltas(name)):
            whole[k] += factors[k] * magnitudes[k]
            kept[k] += _mean(sparse(delta, share))
    return [-math.log10(share) * (e / share) / v if v else 0.0 for v, e in zip(whole, kept, strict=True)]


def _expert(stack: Stack, name: str, k: int, share: float) -> Tensor:
    """Return task k's sparse expert of one layer or whole tensor."""
    delta = next(d for task, d in enumerate(stack.deltas(name)) if task == k)
    return sparse(delta, share)


def _shape(stack: Stack, name: str) -> Sequence[int]:
    """Return (d_out, d_in) of a layer, or the shape of a whole tensor."""
    if name in stack.layers:
        return stack.layers[name][0].d_out, stack.layers[name][0].d_in
    return stack.whole[name][0].shape


def _width(stack: Stack, name: str) -> int:
    """Return the length of a row: d_in of a layer, the last size of a whole tensor."""
    return [0, *_shape(stack, name)][-1]
