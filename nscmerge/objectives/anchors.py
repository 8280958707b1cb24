"""What every expert makes of its own samples: measured once per sample, kept by content, bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nscmerge.batching import Group, fuse

#: Samples whose ratio is kept; about 150 bytes each. Beyond, the oldest are forgotten and would be measured again.
MOST_SAMPLES = 100_000


class Anchors:
    """Ratios by sample key, the oldest forgotten first."""

    def __init__(self, most: int = MOST_SAMPLES) -> None:
        self.most = most
        self._ratios: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._ratios)

    def __contains__(self, key: int) -> bool:
        return key in self._ratios

    def __getitem__(self, key: int) -> float:
        return self._ratios[key]

    def update(self, ratios: Mapping[int, float]) -> None:
        """Keep more of them."""
        self._ratios |= ratios
        while len(self._ratios) > self.most:
            del self._ratios[next(iter(self._ratios))]

    def state(self) -> dict[str, Tensor]:
        """Return ``keys`` (n,) int64 and ``ratios`` (n,) fp64, oldest first."""
        return {
            "keys": torch.tensor(list(self._ratios), dtype=torch.long),
            "ratios": torch.tensor(list(self._ratios.values()), dtype=torch.float64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        self._ratios = dict(zip(state["keys"].tolist(), state["ratios"].tolist(), strict=True))


def sample_keys(group: Group, what: str) -> dict[str, list[int]]:
    """Return one 64-bit key per task and sample, from the content of its inputs without padding.

    Batches carry no sample numbers, and content is the better identity: it holds for any loader, and across epochs,
    resumed runs and processes. Two samples with equal inputs have equal ratios; among n different ones some two share a
    key with a probability of about n^2 / 4e19.

    Args:
        group: Fused batch; what several tasks share is read once.
        what: What is to be kept of the samples, so that two such things do not meet.
    """
    keys: dict[str, list[int]] = {}
    for rows, tasks in group.owners:
        contents = _contents(group, rows)
        for task in tasks:
            digests = (hashlib.blake2b(f"{what} {task}|".encode() + c, digest_size=8).digest() for c in contents)
            keys[task] = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return {task: keys[task] for task in group.rows}


def _contents(group: Group, rows: slice) -> list[bytes]:
    """Return a 128-bit hash of every row's inputs, padding left out."""
    mask = group.mask
    own = {name: value[rows].detach().cpu() for name, value in sorted(group.inputs.items())}
    valid = mask[rows].cpu() if mask is not None else None
    found = []
    for i in range(rows.stop - rows.start):
        digest = hashlib.blake2b(digest_size=16)
        for name, values in own.items():
            along_tokens = valid is not None and values.shape[:2] == valid.shape
            value = values[i][valid[i]] if valid is not None and along_tokens else values[i]
            digest.update(f"|{name} {value.dtype} {tuple(value.shape)}|".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.digest())
    return found


def samples_of(group: Group, task: str, rows: Sequence[int]) -> Group:
    """Return a group of some ``rows`` of ``group``, all of ``task``."""
    (part,) = fuse({task: group.part(torch.tensor(rows))})
    return part
