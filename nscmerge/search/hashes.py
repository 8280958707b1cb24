"""Hash of tensors, wherever they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{tuple(data.shape)}\0{data.dtype}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
