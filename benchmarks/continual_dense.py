"""Textbook recipes of NUFILT and OPCM: dense matrices, full SVDs, autograd. What ours is timed against.

Each works on one layer's M (d_out, d_in) and delta, in their dtype (fp32). The rank rule is given to them: a dense M of
rank 16 has no 128 singular vectors, and which ones fill up is chance. Of the two public orders of NUFILT's products it
is the cheaper one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Absorbed(NamedTuple):
    """M_t of one layer, and NUFILT's loss after the last step, in fp64 (0 for OPCM)."""

    merged: Tensor
    loss: float


def _rank(s: Tensor, shape: Sequence[int]) -> int:
    return int((s > 16 * max(shape) * torch.finfo(s.dtype).eps * s[0]).sum())


def _right_vectors(x: Tensor, count: int) -> Tensor:
    """Return the top right singular vectors as columns."""
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    return vh[: min(count, _rank(s, x.shape))].T


def nufilt(M: Tensor, delta: Tensor, H: Tensor, *, filter_rank: int, task_rank: int, steps: int, lr: float) -> Absorbed:
    """Return M + delta P + delta G H after Adam on the two terms of the loss, from G = 0 and the given H (l, d_in)."""
    Vp, Vv = _right_vectors(M, filter_rank), _right_vectors(delta, task_rank)
    projector = torch.eye(M.shape[1], dtype=M.dtype) - Vp @ Vp.T
    filtered = delta @ projector
    residual = (delta - M - filtered) @ Vv
    G, H = torch.zeros(M.shape[1], len(H), dtype=M.dtype, requires_grad=True), H.to(M.dtype, copy=True).requires_grad_()
    optimizer = torch.optim.Adam([G, H], lr=lr)

    def loss() -> Tensor:
        left = delta @ G
        stability = left @ (H @ Vp)
        plasticity = residual - left @ (H @ Vv)
        return stability.square().sum() + plasticity.square().sum()

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        update = (delta @ G) @ H
        error = torch.cat([update @ Vp, residual - update @ Vv], dim=1)
        return Absorbed(M + filtered + update, float(error.double().square().sum()))


def opcm(M: Tensor, delta: Tensor, *, lam: float, alpha: float) -> Absorbed:
    """Return lam M + U C V^T, C = U^T delta V in full bases without its leading block and its diagonal."""
    u, s, vh = torch.linalg.svd(M, full_matrices=True)
    c = u.T @ delta @ vh.T
    rank = _rank(s, M.shape)
    s = s[:rank]
    split = int((s.cumsum(0) / s.sum() <= alpha).sum())
    c[:split, :split] = 0
    taken = torch.arange(rank)
    c[taken, taken] = 0
    return Absorbed(lam * M + u @ c @ vh, 0.0)
