"""How large the updates are and how far their subspaces coincide, from factors alone: no d_out x d_in matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.factors import RANK_TOLERANCE, LowRank


@dataclass(frozen=True, eq=False)
class Form:
    """One layer's update as ``q_out @ core @ q_in.T``, fp64, with orthonormal columns in both q.

    Args:
        q_in: (d_in, p), p = min(r, d_in); spans at least A's row space.
        q_out: (d_out, q), q = min(r, d_out); spans at least B's column space.
        core: (q, p), scaling included.
        rows: (p, rho), A's row space in coordinates of ``q_in``; rho is A's numerical rank.
        columns: (q, rho), B's column space in coordinates of ``q_out``.
    """

    q_in: Tensor
    q_out: Tensor
    core: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: LowRank) -> Form | None:
        """Return the form of a layer, None where the norm of its product overflows fp32, in which merges are made."""
        q_in, r_in = torch.linalg.qr(layer.A.double().T)
        q_out, r_out = torch.linalg.qr(layer.B.double())
        core = layer.scaling * r_out @ r_in.T
        if not all(torch.linalg.matrix_norm(t) <= torch.finfo(torch.float32).max for t in (r_in, r_out, core)):
            return None
        return cls(q_in, q_out, core, _range(r_in), _range(r_out))

    @property
    def numerical_rank(self) -> int:
        """Singular values of the product above 1e-8 of the largest; 0 for a zero product."""
        s = torch.linalg.svdvals(self.core)
        return int((s > RANK_TOLERANCE * s.max()).sum())


def _range(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of a small matrix's column space, by the rank rule of all geometry."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis: Tensor = u[:, s > RANK_TOLERANCE * s.max()]
    return basis


@dataclass
class Overlap:
    """How far two adapters coincide.

    Args:
        layers: Number of layers that both have, at one shape.
        rows: Mean over these of |Q_i Q_j^T|_F^2 / min(rho_i, rho_j), Q the orthonormal row space of A, in [0, 1];
            layers where a factor is zero are left out, None if none is left.
        columns: The same for the column spaces of B.
        chance: What ``rows`` is on average for random spaces: max(rho_i, rho_j) / d_in.
        inner: Inner product of the updates, summed over layers.
        cosine: ``inner`` over the norms of both whole updates, in [-1, 1]; None if one is zero.
    """

    layers: int = 0
    rows: float | None = None
    columns: float | None = None
    chance: float | None = None
    inner: float = 0.0
    cosine: float | None = None


@dataclass
class Survey:
    """What the factors of some adapters say about each other.

    Args:
        norms: Frobenius norm of the update, by adapter, then layer.
        ranks: Numerical rank of the update, by adapter, then layer.
        overflowing: Layers whose product overflows, by adapter; they have no norm and no rank.
        overlaps: By pair of adapters, in listed order.
    """

    norms: dict[str, dict[str, float]]
    ranks: dict[str, dict[str, int]]
    overflowing: dict[str, list[str]]
    overlaps: dict[tuple[str, str], Overlap] = field(default_factory=dict)

    def norm(self, name: str) -> float:
        """Return the norm of an adapter's whole update: the root of the sum of squares over its layers."""
        return math.hypot(*self.norms[name].values())

    def distance(self, first: str, second: str) -> float | None:
        """Return |D_i - D_j| over the larger norm, good to 1e-8; None if both are zero."""
        larger, smaller = max(self.norm(first), self.norm(second)), min(self.norm(first), self.norm(second))
        if not larger:
            return None
        ratio, inner = smaller / larger, self.overlaps[first, second].inner / larger / larger
        return math.sqrt(max(1 + ratio**2 - 2 * inner, 0.0))


def survey(adapters: Mapping[str, Adapter]) -> Survey:
    """Return norms, ranks and pairwise overlaps of adapters, layer by layer.

    Per layer O((d_in + d_out) R^2) with R the sum of ranks; one layer of all adapters is in memory in fp64.
    """
    names = list(adapters)
    found = Survey({n: {} for n in names}, {n: {} for n in names}, {n: [] for n in names})
    means: dict[tuple[str, str], list[tuple[float, float, float]]] = {pair: [] for pair in combinations(names, 2)}
    found.overlaps = {pair: Overlap() for pair in means}
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.layers}):
        forms: dict[str, Form] = {}
        for name, adapter in adapters.items():
            if layer not in adapter.layers:
                continue
            form = Form.of(adapter.layers[layer])
            if form is None:
                found.overflowing[name].append(layer)
                continue
            forms[name] = form
            found.norms[name][layer] = float(torch.linalg.matrix_norm(form.core))
            found.ranks[name][layer] = form.numerical_rank
        for first, second in combinations(forms, 2):
            _compare(forms[first], forms[second], found.overlaps[first, second], means[first, second])
    for pair, overlap in found.overlaps.items():
        if values := means[pair]:
            overlap.rows, overlap.columns, overlap.chance = (sum(v) / len(v) for v in zip(*values, strict=True))
        norms = found.norm(pair[0]), found.norm(pair[1])
        if min(norms) > 0:
            overlap.cosine = max(-1.0, min(1.0, overlap.inner / norms[0] / norms[1]))
    return found


def _compare(a: Form, b: Form, overlap: Overlap, means: list[tuple[float, float, float]]) -> None:
    """Add one layer that both adapters have, unless its widths differ."""
    if len(a.q_in) != len(b.q_in) or len(a.q_out) != len(b.q_out):
        return
    overlap.layers += 1
    p_in, p_out = a.q_in.T @ b.q_in, a.q_out.T @ b.q_out
    overlap.inner += float(((p_out.T @ a.core @ p_in) * b.core).sum())
    rho_in, rho_out = (a.rows.shape[1], b.rows.shape[1]), (a.columns.shape[1], b.columns.shape[1])
    if min(*rho_in, *rho_out):
        rows = float((a.rows.T @ p_in @ b.rows).square().sum()) / min(rho_in)
        columns = float((a.columns.T @ p_out @ b.columns).square().sum()) / min(rho_out)
        means.append((rows, columns, max(rho_in) / len(a.q_in)))
