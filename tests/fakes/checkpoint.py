"""A small base checkpoint of bare tensors, and updates that fit it."""

import torch
from safetensors.torch import save_file

from nscmerge import LowRank, Update
from nscmerge.peft_format import Kind


def low(rank=2, d_out=4, d_in=6, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LowRank(A, B, scale)


def checkpoint(folder, dtype=torch.float32, **tensors):
    generator = torch.Generator().manual_seed(9)
    folder.mkdir()
    tensors = {
        "fc.weight": torch.randn(4, 6, generator=generator).to(dtype),
        "conv.weight": torch.randn(4, 2, 3, generator=generator).to(dtype),
        "fc.bias": torch.randn(4, generator=generator).to(dtype),
        "scale": torch.tensor(2.0, dtype=dtype),
        "steps": torch.arange(3),
    } | tensors
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return folder


UPDATE = Update(
    {"fc": low(), "conv": torch.randn(4, 6, generator=torch.Generator().manual_seed(4))},
    {"fc.bias": torch.full((4,), 0.5), "scale": torch.tensor(1.0), "fc.weight": torch.ones(4, 6)},
    kinds={"conv": Kind("conv", (2, 3))},
)
