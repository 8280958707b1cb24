"""Leading right singular vectors of a dense matrix: all that NUFILT's filter needs of it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nscmerge.continual.algebra import LARGEST_SVD, at_least_fp32, rank_of

#: Exact, or randomised (twice the vectors, four power iterations).
SvdKind = Literal["exact", "randomized"]
SVD_KINDS: tuple[str, ...] = get_args(SvdKind)


def right_vectors(matrix: Tensor, count: int, *, svd: SvdKind, seed: int, by_rank: bool = True) -> Tensor:
    """Return the top right singular vectors as columns, (d_in, n), n = min(count, rank, d_out, d_in).

    Exact: ``linalg.svd`` up to 4096, beyond that the eigenvectors of the smaller Gram matrix in fp64. Randomised: at
    least 2 count and 32 vectors and 4 power iterations; task vectors have flat spectra, on which less is wrong in the
    very directions that matter.

    Args:
        matrix: (d_out, d_in).
        count: How many are wanted.
        svd: ``exact`` or ``randomized``.
        seed: Of the randomised one; the global generator is left as it was.
        by_rank: Whether to stop at the rank; without it vectors of zero singular values are arbitrary.

    Source: continual merging specification, section 2.5.
    """
    matrix = at_least_fp32(matrix)
    smaller = min(matrix.shape)
    if svd == "randomized" and (wanted := max(2 * count, 32)) < smaller:
        # svd_lowrank reads the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, s, v = torch.svd_lowrank(matrix, q=wanted, niter=4)
    elif smaller > LARGEST_SVD:
        s, v = _by_gram(matrix, count)
    else:
        _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    n = rank_of(s, matrix.shape[0], matrix.shape[1], matrix.dtype) if by_rank else smaller
    return v[:, : min(count, n)].to(matrix.dtype)


def _by_gram(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return singular values, descending, and the top right vectors, from the smaller Gram matrix in fp64."""
    wide = matrix.shape[0] < matrix.shape[1]
    x = matrix.double()
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    s = eigenvalues.clamp(min=0).sqrt().flip(0)
    top = vectors.flip(1)[:, :count]
    if not wide:
        return s, top
    v = x.T @ top
    # Norms, not the roots of eigenvalues: they are more exact. A zero column stays zero, and the rank rule cuts it.
    return s, v / v.norm(dim=0).clamp(min=torch.finfo(v.dtype).tiny)
