"""Base weight + stacked factors + lambda as one module; attach, detach, and the truncated forward. The only hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nscmerge.coefficients import Coefficients
from nscmerge.errors import AdapterError, TargetError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.merged_product import merged_product
from nscmerge.merged_whole import MergedWhole
from nscmerge.quantized import factor_dtype, factor_like
from nscmerge.surgery import linear_layers, replace_module
from nscmerge.whole import WholeLinear
from nscmerge.whole_pass import tie, whole_pass


class _AllCaptured(Exception):
    """Ends a truncated forward pass: the last target layer has its input."""


def _frozen(tensor: Tensor) -> nn.Parameter:
    # A parameter, not a buffer: DDP broadcasts buffers before every forward pass.
    return nn.Parameter(tensor, requires_grad=False)


class MergedLinear(nn.Module):
    """W0 z + B (c * (A z)) with c = repeat(lambda_k): every task's update in two thin products.

    The scaling s_k is folded into B once, so block k of A z is the raw A_k z that null-space geometry reads.

    Args:
        base: Frozen linear layer, (d_out, d_in).
        experts: One entry per task, in coefficient order; None where a task's adapter lacks this layer.
        coefficients: Returns lambda of this layer, (T,), with gradient.
    """

    def __init__(self, base: nn.Linear, experts: Sequence[LowRank | None], coefficients: Callable[[], Tensor]) -> None:
        super().__init__()
        present = [(k, e) for k, e in enumerate(experts) if e is not None]
        like = factor_like(base)
        self.base = base
        self.A = _frozen(torch.cat([e.A.to(like) for _, e in present]))  # (R, d_in)
        # Scaled in fp32, rounded once to the base's dtype.
        self.B = _frozen(
            torch.cat(
                [(e.scaling * e.B.to(torch.promote_types(like.dtype, torch.float32))).to(like) for _, e in present],
                dim=1,
            )
        )  # (d_out, R)
        self.task = _frozen(torch.tensor([k for k, e in present for _ in range(e.rank)], device=like.device))
        self.coefficients = coefficients
        self.on_input: Callable[[Tensor], None] | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Return the merged layer's output, (..., d_out); hands ``z`` to whoever listens first."""
        if self.on_input is not None:
            self.on_input(z)
        # Coefficients are fp32; cast once, at the product.
        # The device is another one where a base is split over several.
        c = self.coefficients().to(z.device)[self.task].to(z.dtype)
        if type(self.base) is nn.Linear and z.dtype == self.A.dtype and not torch.is_autocast_enabled(z.device.type):
            return merged_product(z, c, self.base.weight, self.base.bias, self.A, self.B)
        # Quantised bases multiply in their own way, and autocast has its say about every product.
        out: Tensor = self.base(z)
        return out + nn.functional.linear(c * nn.functional.linear(z, self.A.to(z.dtype)), self.B.to(z.dtype))


class MergedModel:
    """Handle of a base model whose adapted layers are :class:`MergedLinear`.

    Args:
        model: The model, in which they stand.
        layers: By name: layers with factors.
        paths: Their paths in the model.
        coefficients: Whose rows they read.
        whole: By path: layers with whole deltas, which may stand around one of ``layers``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MergedLinear],
        paths: Mapping[str, str],
        coefficients: Coefficients,
        whole: Mapping[str, MergedWhole] | None = None,
    ) -> None:
        self.model, self.layers, self._paths = model, layers, paths
        self.whole = whole or {}
        self._coefficients = coefficients
        #: Strategies change these: whether :meth:`capture` may cut a pass short, whether processes share the weights
        #: and must run equally many passes, and where to bring what is read.
        self.truncated: bool = True
        self.together: bool = False
        self.home: torch.device | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that has a gradient: the coefficients."""
        return list(self._coefficients.parameters())

    def capture(self, inputs: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
        """Return ``{target: its input z (N, ..., d_in)}`` of one forward pass, stopped once all are there.

        Under a strategy that cannot stop a pass it runs to its end, and the inputs carry the gradient all the same.

        Args:
            inputs: Keyword arguments of the model, batch first.
            targets: Names of adapted layers.

        Raises:
            TargetError: The pass ended without some target, or met one twice.
        """
        captured: dict[str, Tensor] = {}

        def record(name: str, z: Tensor) -> None:
            if name in captured:
                raise TargetError(f"target layer '{name}' runs more than once per forward pass; leave it out.")
            captured[name] = z if self.home is None else z.to(self.home)
            if self.truncated and len(captured) == len(targets):
                raise _AllCaptured

        for name in targets:
            self.layers[name].on_input = partial(record, name)
        try:
            if self.truncated:
                self.model(**inputs)
            else:
                end = whole_pass(self.model, inputs)
                captured = {name: tie(z, end) for name, z in captured.items()}
        except _AllCaptured:
            return captured
        finally:
            for name in targets:
                self.layers[name].on_input = None
        if len(captured) == len(targets):
            return captured
        missing = sorted(set(targets) - captured.keys())
        raise TargetError(f"the model's forward pass never ran target layers {missing}; choose targets that it uses.")

    @contextmanager
    def alone(self, task: int) -> Iterator[None]:
        """Run as base model plus one expert, coefficient 1 for it and 0 for the others, until the block ends."""
        every: list[MergedLinear | MergedWhole] = [*self.layers.values(), *self.whole.values()]
        learned = [layer.coefficients for layer in every]
        try:
            for layer in every:
                one_hot = torch.zeros_like(layer.coefficients().detach())
                one_hot[task] = 1
                layer.coefficients = partial(torch.clone, one_hot)
            yield
        finally:
            for layer, coefficients in zip(every, learned, strict=True):
                layer.coefficients = coefficients

    def detach(self) -> nn.Module:
        """Put the base layers back, in place, and return the plain base model."""
        for path, around in self.whole.items():
            replace_module(self.model, path, around.inner)
        for name, layer in self.layers.items():
            replace_module(self.model, self._paths[name], layer.base)
        return self.model


def attach(
    model: nn.Module,
    experts: Mapping[str, Mapping[str, LowRank]],
    coefficients: Coefficients,
    whole: Sequence[WholeLinear] = (),
) -> MergedModel:
    """Swap each adapted ``nn.Linear`` for a :class:`MergedLinear`, in place; nothing is changed if a check fails.

    Args:
        model: Frozen base model.
        experts: ``{task: {layer name: LowRank}}``; tasks and layers as in ``coefficients``.
        coefficients: Their lambdas.
        whole: Linear layers with whole deltas, whose rows ``coefficients`` has, too.

    Raises:
        AdapterError: A layer is missing from the model, is no ``nn.Linear``, has another shape, or two names mean one.
    """
    located: dict[str, tuple[str, nn.Linear]] = {}
    for task, layers in experts.items():
        located |= linear_layers(model, layers, owner=task)
    by_path: dict[str, str] = {}
    for name, (path, _) in located.items():
        if (other := by_path.setdefault(path, name)) != name:
            raise AdapterError(
                f"layers '{other}' and '{name}' of the adapters are one layer of the base model, '{path}'."
            )
    merged = {
        name: MergedLinear(
            located[name][1], [layers.get(name) for layers in experts.values()], partial(coefficients.row, index)
        )
        for index, name in enumerate(coefficients.layers)
        if name in located
    }
    names = ModelNames(model)
    for name, layer in merged.items():
        replace_module(model, located[name][0], layer)
    around = {}
    for linear in whole:
        path = names.path(linear.layer)
        base = names.modules[path]
        assert isinstance(base, nn.Linear)  # for the type checker
        row = partial(coefficients.row, coefficients.layers.index(linear.row))
        around[path] = MergedWhole(model.get_submodule(path), linear.weights, linear.biases, row, factor_dtype(base))
        replace_module(model, path, around[path])
    return MergedModel(model, merged, {name: path for name, (path, _) in located.items()}, coefficients, around)
