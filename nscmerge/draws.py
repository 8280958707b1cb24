"""Random numbers: one generator per thing drawn, seeded from its names alone."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the names (method, task, layer) and on nothing else.

    Not on the order in which layers are visited, nor on Python's hash seed: the first 8 bytes of a SHA-256 seed it.
    """
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
