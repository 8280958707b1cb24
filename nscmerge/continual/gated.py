"""MLPs whose experts a gate weighs: what is kept of them, and how they run beside a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nscmerge.batching import MASK
from nscmerge.continual.algebra import at_least_fp32
from nscmerge.errors import TargetError
from nscmerge.factors import LowRank
from nscmerge.layer_names import ModelNames
from nscmerge.objectives.greedy import DECODER_IDS
from nscmerge.quantized import factor_like
from nscmerge.surgery import linear_layer

#: Between the parts of a tensor's name in a state.
_DOT = "|"


@dataclass(frozen=True, eq=False)
class Mlp:
    """One gated MLP after t experts: g = W mean(x) + b, and its layers compute W_0 x + sum_e g_e delta_e x.

    Args:
        weight: W of the gate, (t, d).
        bias: b, (t,).
        inputs: Mean MLP input of every task, as the merge had it when its expert came, (t, d).
        experts: By layer or tensor name, by number of the expert; experts that lack a name are missing.
    """

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    experts: Mapping[str, Mapping[int, LowRank]] = field(default_factory=dict)

    def gates(self, mean: Tensor) -> Tensor:
        """Return the gates (t,) for a mean input (d,)."""
        return self.weight @ mean.to(self.weight) + self.bias

    def delta(self, name: str, mean: Tensor) -> LowRank:
        """Return sum_e g_e delta_e of one name for a mean input (d,), as factors side by side."""
        g, own = self.gates(mean).tolist(), self.experts[name]
        A = torch.cat([at_least_fp32(x.A) for x in own.values()])
        return LowRank(A, torch.cat([g[e] * x.scaling * at_least_fp32(x.B) for e, x in own.items()], dim=1))


def to_tensors(mlps: Mapping[str, Mlp]) -> dict[str, Tensor]:
    """Return MLPs, by the path of their first layer, as one flat dict for a state. Scalings go into B."""
    found: dict[str, Tensor] = {}
    for entry, mlp in mlps.items():
        for part in ("weight", "bias", "inputs"):
            found[_DOT.join(("gate", entry, part))] = getattr(mlp, part)
        for name, own in mlp.experts.items():
            for e, x in own.items():
                found[_DOT.join(("expert", entry, name, str(e), "A"))] = x.A
                found[_DOT.join(("expert", entry, name, str(e), "B"))] = x.B if x.scaling == 1 else x.scaling * x.B
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Mlp]:
    """Return what :func:`to_tensors` was given."""
    gates: dict[str, dict[str, Tensor]] = {}
    experts: dict[str, dict[str, dict[int, dict[str, Tensor]]]] = {}
    for key in tensors:
        what, entry, *rest = key.split(_DOT)
        if what == "gate":
            gates.setdefault(entry, {})[rest[0]] = tensors[key]
        else:
            name, e, part = rest
            experts.setdefault(entry, {}).setdefault(name, {}).setdefault(int(e), {})[part] = tensors[key]
    return {
        entry: Mlp(
            **gate,
            experts={
                name: {e: LowRank(x["A"], x["B"]) for e, x in sorted(own.items())}
                for name, own in sorted(experts.get(entry, {}).items())
            },
        )
        for entry, gate in sorted(gates.items())
    }


def mlp_of(layer: str) -> str:
    """Return what the layers of one MLP share: their name up to its last number; without one, the parent's name.

    A number at the very end is the layer's own (``mlp.0``, ``mlp.2`` of a ``Sequential``).
    """
    parts = layer.split(".")[:-1]
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def first_layers(model: nn.Module, layers: Sequence[str], run: Callable[[], Any]) -> dict[str, str]:
    """Return, by MLP (:func:`mlp_of`), the linear layer that runs first: its input is the MLP's input.

    Args:
        model: The model.
        layers: Paths of the linear layers to look at.
        run: Runs the model once.
    """
    found: dict[str, str] = {}
    with ExitStack() as stack:
        for path in layers:

            def note(_: nn.Module, __: tuple[Any, ...], path: str = path) -> None:
                found.setdefault(mlp_of(path), path)

            stack.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
        with torch.no_grad():
            run()
    return found


Observer = Callable[[str, Tensor, float], None]


@contextmanager
def gated(
    model: nn.Module,
    mlps: Mapping[str, Mlp],
    gates: Mapping[str, tuple[Tensor, Tensor]],
    *,
    per_sample: bool = False,
    observe: Observer | None = None,
) -> Iterator[None]:
    """Run a model with gated experts beside its MLPs until the block ends.

    Gates see the mean of the MLP input over tokens and batch, or over the tokens of each sample. Tokens that the
    attention mask calls padding do not count, where the mask fits the input.

    Args:
        model: Base model.
        mlps: By the path of their first layer.
        gates: Their (weight, bias), maybe with gradient.
        per_sample: Whether every sample has gates of its own.
        observe: Called with path, sum of the MLP inputs (d,) and how many tokens they were.

    Raises:
        AdapterError: A layer is not in the model or has another shape.
        TargetError: A layer runs before the MLP's first one.
    """
    masks: dict[str, Tensor | None] = {}
    now: dict[str, Tensor] = {}
    names = ModelNames(model)
    encoder = set(model.get_encoder().modules()) if hasattr(model, "get_encoder") else set()  # type: ignore[operator]

    def take_mask(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get(MASK)
        masks["all"] = None if DECODER_IDS in kwargs else mask
        masks["encoder"] = mask

    def gate(entry: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        weight, bias = gates[entry]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, count = token_sums(args[0], masks.get("encoder" if module in encoder else "all"))
            if observe is not None:
                observe(entry, x.detach().sum(0), float(count.sum()))
            mean = x / count.clamp_min(1)[:, None] if per_sample else x.sum(0) / count.sum().clamp_min(1)
            now[entry] = nn.functional.linear(mean, weight.to(mean), bias.to(mean))

        return hook

    def beside(entry: str, name: str, linear: nn.Linear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        own, like = mlps[entry].experts[name], factor_like(linear)
        A = torch.cat([x.A.to(like) for x in own.values()])
        B = torch.cat([(x.scaling * at_least_fp32(x.B)).to(like) for x in own.values()], dim=1)
        owner = torch.tensor([e for e, x in own.items() for _ in range(x.rank)], dtype=torch.long, device=like.device)

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if entry not in now:
                raise TargetError(f"layer '{name}' runs before '{entry}', whose input its gate reads.")
            x = args[0]
            g = now[entry][..., owner].to(x)
            if per_sample:
                g = g.reshape(len(x), *[1] * (x.ndim - 2), -1)
            return out + nn.functional.linear(nn.functional.linear(x, A.to(x.dtype)) * g, B.to(x.dtype))

        return hook

    with ExitStack() as stack:
        # Registered first, so that the gate of a layer's own input is there before its experts ask for it.
        stack.callback(model.register_forward_pre_hook(take_mask, with_kwargs=True).remove)
        for entry, mlp in mlps.items():
            stack.callback(names.modules[entry].register_forward_pre_hook(gate(entry)).remove)
            for name, own in mlp.experts.items():
                _, linear = linear_layer(names, name.removesuffix(".weight"), next(iter(own.values())), "an expert")
                stack.callback(linear.register_forward_hook(beside(entry, name, linear)).remove)
        yield


def token_sums(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (sums over the valid tokens of every sample (N, d), their number (N,)) of x (N, ..., d), fp32 at least.

    Args:
        x: Input of a layer.
        mask: (N, T), 0 for padding; counts where x is (N, T, d).
    """
    flat = at_least_fp32(x).reshape(len(x), -1, x.shape[-1])
    if mask is None or mask.ndim != 2 or x.ndim != 3 or mask.shape != x.shape[:2]:
        valid = torch.ones(flat.shape[:2], device=x.device, dtype=flat.dtype)
    else:
        valid = mask.to(flat)
    return (flat * valid[..., None]).sum(1), valid.sum(1)
