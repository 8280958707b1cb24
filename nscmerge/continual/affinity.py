"""Subspace affinity: how much of the space that a task's data live in a task vector reads."""

from __future__ import annotations

import torch
from torch import Tensor

from nscmerge.continual.state import Weight
from nscmerge.continual.surrogates import top_vectors
from nscmerge.errors import MethodError, ShapeError

#: Ranks of data and task vector; unpublished, our choice.
DATA_RANK, TASK_RANK = 8, 8


def data_subspace(moment: Tensor, rank: int = DATA_RANK) -> Tensor:
    """Return the top eigenvectors of the inputs' second moment E[x x^T], not centred, as columns, (d_in, rank).

    Args:
        moment: (d_in, d_in), symmetric.
        rank: r_d.

    Raises:
        ShapeError: The moment is not square, or has fewer dimensions than ``rank``.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not 1 <= rank <= len(moment):
        raise ShapeError(
            f"second moment of inputs is {tuple(moment.shape)}, rank {rank}; expected a square matrix and a rank from "
            "1 to its size."
        )
    _, vectors = torch.linalg.eigh(moment.double())
    top: Tensor = vectors[:, -rank:].flip(1)
    return top


def subspace_affinity(task_vectors: Tensor, data_vectors: Tensor) -> float:
    """Return norm(V_tau^T V_d)^2 / r_d, in [0, 1]: the share of the data's subspace that lies in the task vector's.

    Args:
        task_vectors: V_tau, orthonormal columns, (d_in, r_v).
        data_vectors: V_d, orthonormal columns, (d_in, r_d), r_d at most r_v.

    Raises:
        ShapeError: The two live in different spaces.

    Source: NUFILT, Eq. 5. Unrelated subspaces give r_v / d_in on average.
    """
    if task_vectors.shape[0] != data_vectors.shape[0]:
        raise ShapeError(
            f"task vector has {task_vectors.shape[0]} inputs, data {data_vectors.shape[0]}; expected one layer's."
        )
    product = task_vectors.double().T @ data_vectors.double()
    return float(product.square().sum()) / max(data_vectors.shape[1], 1)


def affinity(delta: Weight, moment: Tensor, task_rank: int = TASK_RANK, data_rank: int = DATA_RANK) -> float:
    """Return the affinity of one layer's task vector and one task's inputs to that layer.

    Args:
        delta: (d_out, d_in).
        moment: Second moment of the inputs, (d_in, d_in).
        task_rank: r_v; no more singular vectors are taken than delta's rank.
        data_rank: r_d, at most ``task_rank``.

    Raises:
        MethodError: ``data_rank`` is larger than ``task_rank``, so that 1 is out of reach.
        ShapeError: As :func:`data_subspace` and :func:`subspace_affinity`.
    """
    if data_rank > task_rank:
        raise MethodError(f"affinity: data_rank {data_rank} is above task_rank {task_rank}; expected at most that.")
    return subspace_affinity(top_vectors(delta, task_rank), data_subspace(moment, data_rank))
