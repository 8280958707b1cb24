"""Split timm's fused qkv projection into q, k and v, exactly, so that LoRA can adapt them apart as the papers do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nscmerge.errors import ShapeError
from nscmerge.surgery import replace_module


class SplitQKV(nn.Module):
    """Three linear layers in the place of one: cat([q(x), k(x), v(x)]) equals the fused product row by row."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for name, rows in zip("qkv", fused.weight.chunk(3), strict=True):
            layer = nn.Linear(fused.in_features, rows.shape[0], bias=fused.bias is not None, device="meta")
            layer.weight = nn.Parameter(rows.detach().clone(), requires_grad=fused.weight.requires_grad)
            self.add_module(name, layer)
        if fused.bias is not None:
            for name, part in zip("qkv", fused.bias.chunk(3), strict=True):
                bias = nn.Parameter(part.detach().clone(), requires_grad=fused.bias.requires_grad)
                self.get_submodule(name).register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., 3 d): what the fused layer returned."""
        return torch.cat([projection(x) for projection in (self.q, self.k, self.v)], dim=-1)


def split_qkv(model: nn.Module) -> nn.Module:
    """Replace every fused ``qkv`` linear layer, in place, and return the model.

    Afterwards the projections of block i are ``...attn.qkv.q``, ``.k`` and ``.v``. Doing it twice changes nothing.

    Raises:
        ShapeError: A layer named ``qkv`` has an output width that three does not divide.
    """
    fused = [(n, m) for n, m in model.named_modules() if n.split(".")[-1] == "qkv" and isinstance(m, nn.Linear)]
    for name, layer in fused:
        if layer.out_features % 3:
            raise ShapeError(
                f"layer '{name}' has {layer.out_features} outputs; a fused q, k, v of equal width has a multiple of 3."
            )
        replace_module(model, name, SplitQKV(layer))
    return model
