"""A linear layer with whole deltas of several tasks, each at its coefficient: what a trained projector becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class MergedWhole(nn.Module):
    """inner(x) + (sum_k lambda_k D_k) x + sum_k lambda_k d_k: D_k (d_out, d_in) of the weight, d_k of the bias.

    The deltas are summed apart from the base's weight: added to it in half precision they would mostly be rounded off.

    Args:
        inner: Frozen linear layer, or what stands in its place.
        weights: By task number; None where a task leaves the weight alone.
        biases: The same for the bias.
        coefficients: Returns lambda of this layer, (T,), with gradient.
        dtype: That the layer computes in.
    """

    def __init__(
        self,
        inner: nn.Module,
        weights: Sequence[Tensor | None],
        biases: Sequence[Tensor | None],
        coefficients: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        device = next(inner.parameters()).device
        self.inner = inner
        self.D, self.weight_tasks = _stacked(weights, dtype, device)
        self.d, self.bias_tasks = _stacked(biases, dtype, device)
        self.coefficients = coefficients

    def forward(self, x: Tensor) -> Tensor:
        """Return the merged layer's output, (..., d_out)."""
        lam = self.coefficients().to(x.device)  # another one where a base is split over several
        weight = self._sum(lam, self.D, self.weight_tasks, x.dtype)
        bias = self._sum(lam, self.d, self.bias_tasks, x.dtype)
        out: Tensor = self.inner(x)
        if weight is None:
            return out if bias is None else out + bias
        return out + nn.functional.linear(x, weight, bias)

    def _sum(self, lam: Tensor, deltas: Tensor | None, tasks: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if deltas is None or tasks is None:
            return None
        # One matrix-vector product over all entries: nothing of the size of all deltas is kept for the gradient.
        total: Tensor = torch.tensordot(lam[tasks].to(deltas.dtype), deltas, dims=1)
        return total.to(dtype)


def _stacked(
    deltas: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Return the deltas that are there, stacked, and whose they are; parameters, as DDP broadcasts buffers."""
    present = {k: delta for k, delta in enumerate(deltas) if delta is not None}
    if not present:
        return None, None
    stacked = torch.stack([delta.to(device, dtype) for delta in present.values()])
    tasks = torch.tensor(list(present), device=device)
    return nn.Parameter(stacked, requires_grad=False), nn.Parameter(tasks, requires_grad=False)
