"""timm's fused attention split into q, k, v: the same function, and adapters can go on each."""

import pytest
import timm
import torch
from torch import nn

from nscmerge.coefficients import Coefficients
from nscmerge.errors import ShapeError
from nscmerge.factors import LowRank
from nscmerge.merged_linear import attach
from nscmerge.split_qkv import split_qkv
from nscmerge.targets import select_targets


class Attention(nn.Module):
    """The part of timm's Attention that matters: one fused projection, reshaped to (3, B, heads, N, d)."""

    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


def vit(blocks=4, dim=12, bias=True):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for _ in range(blocks):
        block = nn.Module()
        block.attn = Attention(dim, 3, bias)
        model.blocks.append(block)
    model.forward = lambda x: [x := x + b.attn(x) for b in model.blocks][-1]
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_split_is_exact(bias):
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    model = vit(bias=bias)
    before = model.forward(x)
    after = split_qkv(split_qkv(model)).forward(x)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert [n for n, m in model.blocks[0].attn.qkv.named_children()] == ["q", "k", "v"]


def test_each_projection_takes_its_own_update():
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    update = LowRank(torch.randn(2, 12, generator=generator), torch.randn(12, 2, generator=generator), 0.5)
    oracle = vit()
    with torch.no_grad():
        for block in oracle.blocks:
            block.attn.qkv.weight[24:] += 0.4 * update.dense()  # the rows of v
    model = split_qkv(vit()).requires_grad_(False)
    layers = {f"blocks.{i}.attn.qkv.v": update for i in range(4)}
    attach(model, {"a": layers}, Coefficients(sorted(layers), ["a"], init=0.4))
    torch.testing.assert_close(model.forward(x), oracle.forward(x), rtol=1e-5, atol=1e-6)


def test_default_targets_are_the_output_projections():
    model = split_qkv(vit(12))
    adapted = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert set(select_targets(model, adapted)) == {f"blocks.{i}.attn.proj" for i in (9, 10, 11)}


def test_widths_that_three_does_not_divide_are_refused():
    model = nn.Module()
    model.qkv = nn.Linear(4, 10)
    with pytest.raises(ShapeError, match="layer 'qkv' has 10 outputs"):
        split_qkv(model)


@pytest.mark.parametrize("shape", [(32, 32), (48, 64)])  # the size that positions are made for, and interpolated
def test_a_real_timm_model(shape):
    options = {"num_classes": 0, "depth": 2, "img_size": 32, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    before = model.forward_features(x)
    assert before.shape[1] == 1 + shape[0] * shape[1] // 256
    torch.testing.assert_close(split_qkv(model).forward_features(x), before, rtol=1e-5, atol=1e-5)
