"""NUFILT's adapter: the reduced problem of one layer and its two solvers. Gradients by hand, no autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nscmerge.continual.adam import Adam

#: Sines of the angles between new and old subspace up to here count as zero in the least-squares solution.
SMALLEST_SINE = 1e-6


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise norm(K X [V_p, V_v] - target)^2 over the update K X = U^T delta X, with delta = U K.

    U has orthonormal columns, so this is the layer's loss less ``outside``, and the gradients are the same; nothing of
    size d_out stays in the loop.

    Args:
        K: (rho, d_in): diag(S) V^T of an adapter, the triangular factor of a dense delta, or delta itself (U = I).
        Vp: Top right singular vectors of the merge so far, (d_in, p).
        Vv: Top right singular vectors of delta, (d_in, q).
        target: U^T [0, R], (rho, p + q); without the filter U^T [-delta V_p, -M V_v].
        outside: norm(R)^2 - norm(U^T R)^2: the part of the loss that no update in the span of delta can reach.

    Source: NUFILT, Eqs. 10-12; specification, sections 2.1 and 2.2.
    """

    K: Tensor
    Vp: Tensor
    Vv: Tensor
    target: Tensor
    outside: float

    @property
    def V(self) -> Tensor:
        """[V_p, V_v] side by side, (d_in, p + q); not orthogonal in general."""
        return torch.cat([self.Vp, self.Vv], dim=1)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same problem in another dtype."""
        K, Vp, Vv, target = (x.to(dtype) for x in (self.K, self.Vp, self.Vv, self.target))
        return Problem(K, Vp, Vv, target, self.outside)

    def losses(self, update: Tensor | None) -> tuple[float, float]:
        """Return (stability, plasticity), whose sum is the loss, for U^T times the adapter's update (rho, d_in).

        Stability: how much the step moves the output on V_p. Plasticity: how far the merge is from delta on V_v.

        Args:
            update: None for the start, where it is zero.
        """
        error = -self.target if update is None else update @ self.V - self.target
        p = self.Vp.shape[1]
        return float(error[:, :p].square().sum()), float(error[:, p:].square().sum()) + self.outside


@dataclass(frozen=True, eq=False)
class Solution:
    """What the Adam solver ends with.

    Args:
        G: (d_in, l), the paper's B_t.
        H: (l, d_in), the paper's A_t.
        losses: The reduced loss before each step and after the last, (steps + 1,).
        gradient_rms: Root mean square of dL/dG at the start: below 1e-7 Adam's eps 1e-8 takes over.
    """

    G: Tensor
    H: Tensor
    losses: Tensor
    gradient_rms: float


def solve_adam(problem: Problem, H: Tensor, *, steps: int, lr: float, normalize: bool = False) -> Solution:
    """Return the adapter after some full-batch Adam steps from G = 0 and a drawn H.

    With W = H V (l, k), Y = K G (rho, l), E = Y W - target: dL/dH = 2 (Y^T E) V^T, dL/dG = 2 K^T (E W^T). The same
    iterates as the objective as written; per step 2 rho d_in l + 2 l k d_in + 3 rho l k multiplications.

    Args:
        problem: The layer's.
        H: Start, (l, d_in).
        steps: Number of steps; 50 in the paper. They are a regulariser: the exact minimum is fitted too hard.
        lr: Step size, 1e-3 in the paper.
        normalize: Divide delta and M by the largest singular value of delta inside the solve, so that Adam's eps does
            not matter for tiny task vectors.

    Source: NUFILT, Algorithm 1; specification, section 2.2.
    """
    K, target, V = problem.K, problem.target, problem.V
    scale = float(torch.linalg.matrix_norm(K, 2)) if normalize else 1.0
    if scale != 1.0:
        K, target = K / scale, target / scale
    # One tensor for both, (2, d_in, l): one optimizer step instead of two.
    x = torch.stack([torch.zeros_like(H.T), H.T])
    gradient = torch.empty_like(x)
    G, Ht = x[0], x[1]
    optimizer = Adam(x, lr)
    losses = []
    rms = 0.0
    for step in range(steps):
        W, Y = Ht.T @ V, K @ G
        E = Y @ W - target
        losses.append(E.square().sum())
        torch.mm(K.T, E @ W.T, out=gradient[0])
        torch.mm(V, E.T @ Y, out=gradient[1])
        gradient.mul_(2)
        if not step:
            rms = float(gradient[0].square().mean().sqrt())
        optimizer.step(gradient)
    losses.append(((K @ G) @ (Ht.T @ V) - target).square().sum())
    return Solution(G, Ht.T, scale**2 * torch.stack(losses), rms)


def solve_least_squares(problem: Problem, filtered: bool) -> Tensor:
    """Return U^T Delta of the update in the column space of delta with the smallest loss, (rho, d_in).

    With the filter Delta = U U^T R (P V_v)^+, P = I - V_p V_p^T: no stability loss, and of the plasticity loss what
    lies outside the columns of delta. Singular values of P V_v are sines of the angles between new and old subspace;
    those below 1e-6 are cut. Without it U^T Delta = target V^+. Exact, and fitted too hard: an analysis, and a lower
    bound of what Adam reaches with an adapter of rank q or more.

    Source: specification, section 2.3.
    """
    p = problem.Vp.shape[1]
    if not filtered:
        return problem.target @ _pinv(problem.V)
    outside = problem.Vv - problem.Vp @ (problem.Vp.T @ problem.Vv)
    return problem.target[:, p:] @ _pinv(outside)


def _pinv(x: Tensor) -> Tensor:
    """Return the pseudo-inverse, singular values up to 1e-6 (absolute) cut: (k, n) of (n, k)."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > SMALLEST_SINE
    inverse: Tensor = (vh[keep].T / s[keep]) @ u[:, keep].T
    return inverse
