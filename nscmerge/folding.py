"""Fold learned coefficients into one update: lambda goes into B, every task's factors stand side by side.

Whole deltas of linear layers are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nscmerge.adapters import Adapter
from nscmerge.coefficients import Coefficients
from nscmerge.factors import LowRank
from nscmerge.whole import WholeLinear


def fold(experts: Mapping[str, Adapter], coefficients: Coefficients) -> dict[str, LowRank]:
    """Return ``{layer: LowRank}`` of rank R = sum of ranks: A = [A_1; ..; A_K], B = [s_1 lambda_1 B_1, ..], scaling 1.

    Exact: nothing is truncated; fp32 whatever dtype the adapters are stored in.
    """
    matrix = coefficients.matrix().cpu().double()  # fp64 so that lambda * s_k is rounded once, with B
    layers = {}
    for row, layer in enumerate(coefficients.layers):
        present = [(k, a.layers[layer]) for k, a in enumerate(experts.values()) if layer in a.layers]
        if not present:  # a row of whole deltas
            continue
        A = torch.cat([e.A.float() for _, e in present])
        B = torch.cat([(float(matrix[row, k]) * e.scaling * e.B.double()).float() for k, e in present], dim=1)
        layers[layer] = LowRank(A, B)
    return layers


def fold_whole(whole: Sequence[WholeLinear], coefficients: Coefficients) -> dict[str, Tensor]:
    """Return ``{tensor: sum_k lambda_k D_k}`` of the linear layers with whole deltas, fp32 on the CPU."""
    matrix = coefficients.matrix().cpu()
    merged: dict[str, Tensor] = {}
    for linear in whole:
        lam = matrix[coefficients.layers.index(linear.row)].tolist()
        for name, deltas in (("weight", linear.weights), ("bias", linear.biases)):
            total: Tensor | None = None
            for value, delta in zip(lam, deltas, strict=True):
                if delta is not None:
                    term = value * delta.cpu().float()
                    total = term if total is None else total.add_(term)
            if total is not None:
                merged[f"{linear.layer}.{name}"] = total
    return merged


def table(
    experts: Mapping[str, Adapter], coefficients: Coefficients, whole: Sequence[WholeLinear] = ()
) -> dict[str, dict[str, float | None]]:
    """Return ``{task: {layer: lambda}}``, None where the task's adapter lacks the layer."""
    matrix = coefficients.matrix().tolist()
    changed = {(linear.row, k) for linear in whole for k in linear.tasks()}
    return {
        task: {
            layer: matrix[row][k] if layer in adapter.layers or (layer, k) in changed else None
            for row, layer in enumerate(coefficients.layers)
        }
        for k, (task, adapter) in enumerate(experts.items())
    }
