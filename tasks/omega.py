"""The null-space ratio of layers while their adapters train (Figure 1 of NSC): what A discards of a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nscmerge.geometry import residual_ratio, row_space, token_mean

#: Raw down-projection A of every watched layer, by the layer's name.
Projections = Mapping[str, Tensor]


@contextmanager
def captured_omega(
    model: nn.Module, projections: Projections, mask: Tensor | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that a forward pass fills with the mean omega over valid tokens of each sample, (N,) per layer.

    Args:
        model: Model that holds the layers; it may change their output, only their input is read.
        projections: A, (r, d_in), per layer.
        mask: Valid tokens, (N, T), or None. It counts for layers whose input is (N, T, d_in); others see no tokens.
    """
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_recorder(found, name, row_space(A.detach())))
        for name, A in projections.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for name, omega in found.items():
        valid = mask.bool() if mask is not None and mask.shape == omega.shape else None
        found[name] = token_mean(omega, valid)


def _recorder(found: dict[str, Tensor], name: str, basis: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            found[name] = residual_ratio(args[0], basis)

    return record
