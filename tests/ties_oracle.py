"""TIES and DARE as the papers state them, on whole vectors at once, entry by entry: slow and obvious."""

import torch


def trimmed_at_threshold(v, density):
    """One task's vector (N,): keep magnitudes from the (N - int(density N))-th smallest upwards."""
    kept = len(v) - int(density * len(v))
    if kept == 0:
        return v
    return torch.where(v.abs() >= v.abs().sort().values[kept - 1], v, 0.0)


def trimmed_to_count(v, density):
    """One tensor: keep exactly round(density n) entries, one at least, the first of equal ones."""
    order = sorted(range(v.numel()), key=lambda i: (-abs(float(v.flatten()[i])), i))
    keep = torch.zeros(v.numel(), dtype=torch.bool)
    keep[order[: max(1, round(density * v.numel()))]] = True
    return torch.where(keep.reshape(v.shape), v, 0.0)


def by_values(vectors, agg):
    """Merge trimmed vectors (K, N): sign of the sum, where that is 0 the majority's; then the mean or sum of that."""
    signs = vectors.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    return _disjoint(vectors, ["+" if g > 0 else "-" for g in signs], agg)


def by_signs(vectors, agg):
    """Merge trimmed vectors (K, N): sign of the sum of signs, + where that is 0."""
    return _disjoint(vectors, ["+" if g >= 0 else "-" for g in vectors.sign().sum(0)], agg)


def _disjoint(vectors, signs, agg):
    out = torch.zeros(vectors.shape[1])
    for i, sign in enumerate(signs):
        agree = [v for v in vectors[:, i].tolist() if (v > 0 if sign == "+" else v < 0)]
        if agree:
            out[i] = sum(agree) / (len(agree) if agg == "mean" else 1)
    return out


def flat(tensors):
    """``{name: tensor}`` of one task as one vector, in sorted order of names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def unflat(vector, like):
    """The reverse of :func:`flat`, with the shapes of ``like``."""
    parts = vector.split([like[name].numel() for name in sorted(like)])
    return {name: part.reshape(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


def ties(tasks, density, agg="mean"):
    """``tasks``: per task ``{name: tensor}``; trimmed over all names together, elected by values."""
    vectors = torch.stack([trimmed_at_threshold(flat(tensors), density) for tensors in tasks])
    return unflat(by_values(vectors, agg), tasks[0])


def ties_papercode(tasks, density, agg="sum", masks=None, drop=0.0):
    """``tasks``: per task ``{name: tensor}``; trimmed name by name, then dropped by ``masks``, elected by signs."""
    merged = {}
    for name in tasks[0]:
        rows = [trimmed_to_count(tensors[name], density).flatten() for tensors in tasks]
        if masks is not None:
            rows = [row * m[name].flatten() / (1 - drop) for row, m in zip(rows, masks, strict=True)]
        merged[name] = by_signs(torch.stack(rows), agg).reshape(tasks[0][name].shape)
    return merged


def dare(tasks, masks, drop):
    """``tasks`` with entries outside the masks set to 0 and the rest rescaled."""
    return [{n: t * m[n] / (1 - drop) for n, t in tensors.items()} for tensors, m in zip(tasks, masks, strict=True)]
