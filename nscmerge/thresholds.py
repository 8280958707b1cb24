"""Order statistics of more numbers than fit in memory: exact, in two passes over a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

#: A pass over the data, named by its label: for every layer the tensors of all tasks. Each call must give the same.
Stream = Callable[[str], Iterable[Iterable[Tensor]]]

#: Entries looked at together: temporaries stay in the cache, and torch starts no threads, which would have to wait for
#: each other after every operation (up to 17 times slower, measured where other programs used the cores).
_PIECE = 1 << 15


def kth_magnitudes(stream: Stream, tasks: int, index: Callable[[int], int]) -> list[float]:
    """Return, per task, the ``index(N)``-th smallest magnitude of its N fp32 entries, exactly.

    The bit pattern of a non-negative fp32 number, read as an integer, grows with the number. So the first pass counts
    the upper 16 bits, which finds the bin of the wanted entry; the second counts the lower 16 bits inside that bin. All
    tasks share both passes; the second is left out where the answer of every task is 0 or nobody needs one.

    Args:
        stream: Called once per pass; per layer it yields one fp32 tensor for each task, of any shape, always in the
            same order of tasks. Memory is one such tensor, half of another, and some counts.
        tasks: Number of tasks K.
        index: From N to the wanted rank, 1 for the smallest, at most N; 0 stands for no threshold and gives 0.

    Returns:
        K numbers >= 0, each of them representable in fp32 (one of the magnitudes, or 0).

    Source: radix selection; NSC merging specification, section 2.2.
    """
    upper = torch.zeros(tasks, 1 << 15, dtype=torch.long)
    zeros = [0] * tasks
    for tensors in stream("thresholds, first pass"):
        for task, tensor in enumerate(tensors):
            parts = []
            for bits in _magnitude_bits(tensor):
                parts.append((bits >> 16).to(torch.int16))
                zeros[task] += bits.numel() - int(torch.count_nonzero(bits))
            upper[task] += torch.bincount(torch.cat(parts), minlength=1 << 15).cpu()
    wanted = [index(int(counts.sum())) for counts in upper]
    found = [_locate(counts, rank) for counts, rank in zip(upper, wanted, strict=True)]
    open_tasks = {task for task, rank in enumerate(wanted) if rank > zeros[task]}
    lower = torch.zeros(tasks, 1 << 16, dtype=torch.long)
    for tensors in stream("thresholds, second pass") if open_tasks else ():
        for task, tensor in enumerate(tensors):
            if task in open_tasks:
                inside = [bits[bits >> 16 == found[task][0]] & 0xFFFF for bits in _magnitude_bits(tensor)]
                lower[task] += torch.bincount(torch.cat(inside), minlength=1 << 16).cpu()
    patterns = [
        (found[task][0] << 16) + _locate(lower[task], found[task][1])[0] if task in open_tasks else 0
        for task in range(tasks)
    ]
    values: list[float] = torch.tensor(patterns, dtype=torch.int32).view(torch.float32).tolist()
    return values


def _magnitude_bits(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bit patterns of |v| as int32 >= 0, piece by piece."""
    for piece in torch.split(tensor.detach().to(torch.float32).flatten(), _PIECE):
        yield piece.abs().view(torch.int32)


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return (bin, rank inside it) of the ``rank``-th smallest entry of a histogram, both ranks from 1."""
    up_to = counts.cumsum(0)
    bin_ = int(torch.searchsorted(up_to, rank))
    return bin_, rank - int(up_to[bin_ - 1]) if bin_ else rank
