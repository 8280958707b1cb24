"""The null-space ratio of layers while their adapters train (Figure 1 of NSC): what A discards of a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

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


class OmegaMeter(nn.Module):
    """Mean null-space ratio of every watched layer over many batches and processes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        # A list: layer names hold dots, which nn.ModuleDict refuses.
        self.means = nn.ModuleList()

    def watch(self, names: Iterable[str]) -> None:
        """Name the layers, once they are there."""
        self.names = list(names)
        self.means.extend(MeanMetric() for _ in self.names)

    def add(self, omega: Mapping[str, Tensor]) -> None:
        """Add the ratios of a batch, as :func:`captured_omega` gives them."""
        for name, mean in zip(self.names, self.means, strict=True):
            if name in omega:
                mean.update(omega[name])  # type: ignore[operator]

    def reset(self) -> None:
        """Start anew."""
        for mean in self.means:
            mean.reset()  # type: ignore[operator]

    def pop(self) -> dict[str, Tensor]:
        """Return ``omega/<layer>`` and ``omega/mean`` of the layers that were seen, and start anew."""
        pairs = zip(self.names, self.means, strict=True)
        found = {f"omega/{name}": mean.compute() for name, mean in pairs if mean.update_called}  # type: ignore[operator]
        self.reset()
        return {**found, "omega/mean": torch.stack(list(found.values())).mean()} if found else {}
