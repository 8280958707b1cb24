"""LoRA-LEGO: rank-one units of all adapters, clustered, each cluster becoming one unit of the merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nscmerge.draws import generator
from nscmerge.errors import MethodError
from nscmerge.factors import LowRank, check_same_layer
from nscmerge.methods.dense import dense_mean
from nscmerge.methods.kinds import Merged
from nscmerge.methods.options import check_whole
from nscmerge.methods.stacking import rooted, working_dtype
from nscmerge.naming import unknown
from nscmerge.stack import Stack

#: Rounds of k-means; the labels of the last one count.
ROUNDS = 10
#: Squared distances between features lie in [0, 8]; closer than this they are one, and the lower index wins.
TIE = 1e-12


def lora_lego(
    stack: Stack,
    *,
    lam: float = 1.0,
    clusters: int | None = None,
    seed: int = 0,
    init_perm: Mapping[str, Tensor] | None = None,
) -> Merged:
    """Return ``lam`` times the clustered merge of every layer, of rank ``clusters``; whole tensors are averaged.

    The start of k-means is drawn per layer from the seed and the layer's name alone, or given. A start names units by
    their place, so the order of the adapters matters for it, and only for it.

    Args:
        stack: K adapters, each with every layer; their ranks may differ, their scalings may not be negative.
        lam: Merge coefficient, no unit.
        clusters: Rank of the merge; the layer's largest rank if None.
        seed: Any whole number, 0 included (the NSC authors' code reads 0 as no seed).
        init_perm: Instead of the seed: by layer, places of distinct units in the pool (task by task, then by rank)
            whose features are the first centroids. Of a longer list (a whole permutation) the first ``clusters`` count.

    Raises:
        MethodError: ``clusters`` exceeds the number of units of a layer, ``init_perm`` does not fit, or a scaling is
            negative.

    Source: Zhao et al., arXiv:2409.16167, by the NSC authors' code, since none of its own was found.
    """
    check_whole("lora_lego", "seed", seed)
    if clusters is not None:
        check_whole("lora_lego", "clusters", clusters, at_least=1)
    if init_perm is not None:
        _check_names(init_perm, stack)
    layers = {}
    for name in stack.watch(stack.layers, "clustering"):
        experts = stack.layers[name]
        units, most = sum(e.rank for e in experts), max(e.rank for e in experts)
        k = most if clusters is None else clusters
        if k > units:
            raise MethodError(
                f"lora_lego: clusters is {k}, but layer '{name}' has {units} rank-one units in all; expected a whole "
                f"number from 1 to {units}."
            )
        if init_perm is None:
            start = torch.randperm(units, generator=generator(seed, "lora_lego", name))[:k]
        else:
            start = _given(init_perm[name], name, k, units)
        try:
            layers[name] = merge_units(experts, start, lam=lam)
        except MethodError as error:
            raise MethodError(f"layer '{name}' of {', '.join(map(repr, stack.tasks))}: {error}") from error
    return Merged(layers, {name: dense_mean(deltas, lam=lam) for name, deltas in stack.whole.items()})


def merge_units(experts: Sequence[LowRank], start: Tensor, *, lam: float = 1.0) -> LowRank:
    """Return the clustered merge of one layer: a pair of rank k, one unit per cluster, zero for an empty one.

    Units are rows of A and columns of B, sqrt(s_k) in both. They are compared by direction (a / |a|, b / |b|) and
    averaged as they are; the mean is rescaled to the mean largest entry of its members. The merge is multiplied by
    ``sqrt(r / k)``, r the largest rank.

    Args:
        experts: One layer of K adapters: A (r_k, d_in), B (d_out, r_k), scaling s_k >= 0.
        start: (k,) places of the units whose features are the first centroids.
        lam: Merge coefficient, no unit; it goes into B.

    Raises:
        ShapeError: The experts differ in d_in or d_out.
        MethodError: A scaling is negative.
    """
    check_same_layer(experts)
    factors = rooted(experts, "lora_lego", torch.float64)
    a, b = torch.cat([A for A, _ in factors]), torch.cat([B.T for _, B in factors])
    features = torch.cat([_direction(a), _direction(b)], dim=1)
    units = torch.cat([a, b], dim=1)
    labels = k_means(features, start)
    # Row c averages cluster c; a cluster without members averages nothing and stays 0.
    member = torch.nn.functional.one_hot(labels, len(start)).T.double()
    member /= member.sum(1, keepdim=True).clamp(min=1)
    mean = member @ units
    largest = member @ units.abs().amax(1, keepdim=True)
    mean = mean * (largest / (mean.abs().amax(1, keepdim=True) + 1e-12))
    scale = lam * math.sqrt(max(e.rank for e in experts) / len(start))
    dtype = working_dtype(experts)
    d_in = experts[0].d_in
    return LowRank(mean[:, :d_in].to(dtype), (scale * mean[:, d_in:].T).to(dtype))


def k_means(features: Tensor, start: Tensor) -> Tensor:
    """Return the labels (n,) of n features (n, d) after ten rounds, the last without moving the centroids any more.

    Squared distance, ties to the lowest cluster; a cluster without members keeps its centroid. Every centroid is a
    weighted mean of features, so distances are taken from their Gram matrix: O(n^2 d) once, then O(n^2 k) a round.

    Args:
        features: fp64, rows of norm sqrt(2) at most.
        start: (k,) places of the first centroids among the features.
    """
    gram = features @ features.T
    weights = torch.nn.functional.one_hot(start.to(features.device), len(features)).to(
        features.dtype
    )  # (k, n): centroid = weights @ features
    for done in range(1, ROUNDS + 1):
        cross = gram @ weights.T
        # |f|^2 is the same for all clusters and cannot change which is nearest.
        distance = (weights @ cross).diagonal() - 2 * cross
        near = distance <= distance.min(1, keepdim=True).values + TIE
        labels = near.to(torch.uint8).argmax(1)
        if done < ROUNDS:
            member = torch.nn.functional.one_hot(labels, len(start)).T.to(features.dtype)
            count = member.sum(1, keepdim=True)
            weights = torch.where(count > 0, member / count.clamp(min=1), weights)
    return labels


def _direction(vectors: Tensor) -> Tensor:
    """Rows divided by their norm; 1e-8 keeps a zero row zero."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / (norms + 1e-8)


def _check_names(init_perm: Mapping[str, Tensor], stack: Stack) -> None:
    """Raise unless there is one start for each layer."""
    if not isinstance(init_perm, Mapping):
        raise MethodError(f"lora_lego: init_perm is a {type(init_perm).__name__}; expected {{layer: long tensor}}.")
    for layer in init_perm:
        if layer not in stack.layers:
            raise MethodError(f"lora_lego: init_perm names {unknown('layer', layer, stack.layers)}")
    if lacking := [layer for layer in stack.layers if layer not in init_perm]:
        raise MethodError(
            f"lora_lego: init_perm lacks layer '{lacking[0]}' ({len(lacking)} of {len(stack.layers)} layers lack it); "
            "give every layer's start, or a seed instead."
        )


def _given(start: Tensor, layer: str, k: int, units: int) -> Tensor:
    """Return the first k places of a given start, checked."""
    is_list = isinstance(start, Tensor) and start.dtype == torch.long and start.ndim == 1
    places = start[:k].tolist() if is_list else []
    if len(places) < k or len(set(places)) < k or min(places) < 0 or max(places) >= units:
        got = f"{tuple(start.shape)} {start.dtype} {places}" if isinstance(start, Tensor) else repr(start)
        raise MethodError(
            f"lora_lego: init_perm of layer '{layer}' is {got}; expected a torch.long tensor of one dimension with at "
            f"least {k} distinct places from 0 to {units - 1}."
        )
    return start[:k]
