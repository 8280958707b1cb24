"""KnOTS: the updates of all tasks in one common basis, by exact algebra on the factors. No dense matrix is formed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nscmerge.factors import RANK_TOLERANCE, LowRank, check_same_layer
from nscmerge.lazy import Lazy
from nscmerge.methods.kinds import Merged
from nscmerge.methods.ties_space import Merge, Space
from nscmerge.stack import Stack

#: Singular values up to here are cut, whatever the scale of the adapters: so the reference has it.
CUT = 1e-5
#: Neighbouring singular values closer than this, relative to the larger, leave the basis itself open.
_SMALL_GAP = 1e-6


@dataclass(frozen=True, eq=False)
class Aligned:
    """One layer of K tasks in one basis: ``delta_k = basis @ C_k`` up to what was cut.

    C_k is kept as a product of two small factors, in fp64.

    Args:
        basis: U, (d_out, rho), orthonormal columns; of each the entry of largest magnitude is positive.
        coordinates: K matrices diag(sigma) W_k^T, (rho, r_k).
        row_bases: K matrices Q_k, (d_in, r_k), orthonormal columns.
        sigma: The singular values kept, descending, (rho,).
        cut: Those cut although they are not rounding noise, descending.
    """

    basis: Tensor
    coordinates: Sequence[Tensor]
    row_bases: Sequence[Tensor]
    sigma: Tensor
    cut: Tensor

    def components(self) -> Iterator[Tensor]:
        """Yield C_k of every task in order: (rho, d_in) fp32, rows by descending singular value."""
        for coordinates, rows in zip(self.coordinates, self.row_bases, strict=True):
            yield (coordinates @ rows.T).to(torch.float32)


def align(experts: Sequence[LowRank]) -> Aligned:
    """Return the SVD U diag(sigma) [V_1^T .. V_K^T] of ``[delta_1, ..., delta_K]`` of one layer, cut at 1e-5.

    QR of the stacked B and of every A_k^T, then the SVD of the small core R_B blockdiag(s_k T_k^T), all in fp64:
    O((d_in + d_out) R^2 + R^3) with R = sum_k r_k. The signs that an SVD leaves open are fixed by the basis, so that
    neither the order of tasks nor the SVD routine changes a component.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k; ranks may differ, and be 0.

    Raises:
        ShapeError: No expert, or d_in or d_out differ.

    Source: Stoica et al., arXiv:2410.19735, and their code (cut at 1e-5, absolute); the factor algebra is ours.
    """
    check_same_layer(experts)
    q_out, r_out = torch.linalg.qr(torch.cat([e.B.double() for e in experts], dim=1))
    rows = [torch.linalg.qr(e.A.double().T) for e in experts]
    columns = torch.split(r_out, [e.rank for e in experts], dim=1)
    blocks = [e.scaling * r @ t.T for e, r, (_, t) in zip(experts, columns, rows, strict=True)]
    u, s, wh = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    keep = s > CUT
    basis = q_out @ u[:, keep]
    sign = _signs(basis)
    coordinates = (sign * s[keep])[:, None] * wh[keep]
    noise = RANK_TOLERANCE * s.max() if len(s) else 0.0
    return Aligned(
        basis * sign,
        torch.split(coordinates, [block.shape[1] for block in blocks], dim=1),
        [q for q, _ in rows],
        s[keep],
        s[~keep & (s > noise)],
    )


def align_all(stack: Stack, method: str) -> tuple[dict[str, Aligned], dict[str, Any]]:
    """Return every layer of a stack in its basis, and what the receipt should say: what was cut, and where it is open.

    Warns where components were lost to the cut.
    """
    aligned = {name: align(stack.layers[name]) for name in stack.watch(stack.layers, "common bases")}
    report: dict[str, Any] = {}
    if cut := {name: _cut(layer) for name, layer in aligned.items() if len(layer.cut)}:
        report["cut_components"] = cut
        worst = max(cut, key=lambda name: float(cut[name]["share_of_norm"]))
        warnings.warn(
            f"{method}: {len(cut)} of {len(aligned)} layers lose components with singular values up to {CUT:g} (the "
            f"reference's cut, absolute); most in '{worst}': {cut[worst]['share_of_norm']:.2%} of the norm. If that is "
            "much, the adapters are too small for KnOTS: use ties, or raise their alpha and lower lam.",
            stacklevel=2,
        )
    if gaps := {name: gap for name, layer in aligned.items() if (gap := _smallest_gap(layer.sigma)) < _SMALL_GAP}:
        report["nearly_equal_singular_values"] = gaps
    return aligned, report


def component_space(stack: Stack, aligned: Mapping[str, Aligned]) -> Space:
    """Return the space of the components C_k of all layers."""
    shapes = {name: (len(layer.sigma), len(layer.row_bases[0])) for name, layer in aligned.items()}
    return Space(tuple(stack.tasks), shapes, lambda name: aligned[name].components(), stack.watch)


def assemble(
    stack: Stack, aligned: Mapping[str, Aligned], merge: Merge, merge_whole: Merge, lam: float, report: dict[str, Any]
) -> Merged:
    """Return ``lam U C`` of every layer as factors (A = C, B = lam U), and whole tensors merged by themselves."""
    layers: dict[str, LowRank | Tensor] = {
        name: LowRank(merge(name), lam * aligned[name].basis.to(torch.float32))
        for name in stack.watch(aligned, "merging")
    }
    whole = Lazy(sorted(stack.whole), lambda name: lam * merge_whole(name))
    return Merged(layers, whole, report=report)


def _signs(basis: Tensor) -> Tensor:
    """Return +1 or -1 per column: the sign of its entry of largest magnitude."""
    if not basis.shape[1]:
        return basis.new_ones(0)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(basis)


def _cut(layer: Aligned) -> dict[str, float | int]:
    """Return one line of the receipt: how many components are kept and cut, and how much of the norm that is."""
    lost, kept = float(layer.cut.square().sum()), float(layer.sigma.square().sum())
    return {
        "kept": len(layer.sigma),
        "cut": len(layer.cut),
        "largest_cut": float(layer.cut[0]),
        "share_of_norm": (lost / (lost + kept)) ** 0.5,
    }


def _smallest_gap(sigma: Tensor) -> float:
    """Return the smallest relative gap between neighbouring singular values; infinite for fewer than two."""
    if len(sigma) < 2:
        return float("inf")
    return float(((sigma[:-1] - sigma[1:]) / sigma[:-1]).min())
