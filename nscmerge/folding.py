"""Fold learned coefficients into one update: lambda goes into B, every task's factors stand side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nscmerge.adapters import Adapter
from nscmerge.coefficients import Coefficients
from nscmerge.factors import LowRank


def fold(experts: Mapping[str, Adapter], coefficients: Coefficients) -> dict[str, LowRank]:
    """Return ``{layer: LowRank}`` of rank R = sum of ranks: A = [A_1; ..; A_K], B = [s_1 lambda_1 B_1, ..], scaling 1.

    Exact: nothing is truncated; fp32 whatever dtype the adapters are stored in.
    """
    matrix = coefficients.matrix().cpu().double()  # fp64 so that lambda * s_k is rounded once, with B
    layers = {}
    for row, layer in enumerate(coefficients.layers):
        present = [(k, a.layers[layer]) for k, a in enumerate(experts.values()) if layer in a.layers]
        A = torch.cat([e.A.float() for _, e in present])
        B = torch.cat([(float(matrix[row, k]) * e.scaling * e.B.double()).float() for k, e in present], dim=1)
        layers[layer] = LowRank(A, B)
    return layers


def table(experts: Mapping[str, Adapter], coefficients: Coefficients) -> dict[str, dict[str, float | None]]:
    """Return ``{task: {layer: lambda}}``, None where the task's adapter lacks the layer."""
    matrix = coefficients.matrix().tolist()
    return {
        task: {
            layer: matrix[row][k] if layer in adapter.layers else None for row, layer in enumerate(coefficients.layers)
        }
        for k, (task, adapter) in enumerate(experts.items())
    }
