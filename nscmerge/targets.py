"""Choose target layers by parsed block index and exact projection name, never by substring."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from nscmerge.errors import TargetError
from nscmerge.surgery import resolve_layer

#: Names of the attention's output projection in common models, tried in this order; then those of the value projection.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "attention.output.dense", "attn.proj", "SelfAttention.o", "attn.c_proj")
VALUE_PROJECTIONS = ("v_proj", "value", "attn.qkv.v", "SelfAttention.v", "v")

Blocks = Literal["last_quarter"] | int | list[int]


class Place(NamedTuple):
    """Where a layer sits: ``container`` 'encoder.layer', ``block`` 5, ``projection`` 'attention.output.dense'."""

    container: str
    block: int
    projection: str


def place(layer: str) -> Place | None:
    """Return the place of a dotted layer name, split at its first numeric part; None where it has none."""
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return Place(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return None


def is_projection(layer: str, name: str) -> bool:
    """Whether ``layer`` is the projection ``name``: equal, or ending in it at a dot."""
    return layer == name or layer.endswith(f".{name}")


def select_targets(
    model: nn.Module,
    layers: Iterable[str],
    blocks: Blocks = "last_quarter",
    projections: Sequence[str] | None = None,
) -> list[str]:
    """Return the target layers among the adapted ones, in sorted order.

    Args:
        model: Base model; its module list says how many blocks there are.
        layers: Names of the adapted layers.
        blocks: ``last_quarter`` (rounded up: 2 of 6, 3 of 12, 8 of 32), the number of last blocks, or their indices.
        projections: Exact names, such as ``['v_proj']`` or ``['attention.output.dense']``; None takes the attention's
            output projection where it is adapted, else the value projection (spec 3.3).

    Raises:
        TargetError: Nothing is left, with what there was to choose from.
    """
    names = sorted(layers)
    chosen = [n for n in names if _in_blocks(n, names, model, blocks)]
    if projections is None:
        projections = _default_projections(chosen)
    targets = [n for n in chosen if any(is_projection(n, p) for p in projections)]
    if not targets:
        places = [p for n in names if (p := place(n))]
        raise TargetError(
            f"no target layer is left: blocks {blocks!r} and projections {list(projections)} match none of the "
            f"{len(names)} adapted layers. Adapted blocks: {sorted({p.block for p in places})}; projections: "
            f"{sorted({p.projection for p in places} or names)}. Set blocks or projections to some of these."
        )
    return targets


def _default_projections(layers: Sequence[str]) -> list[str]:
    for name in (*OUTPUT_PROJECTIONS, *VALUE_PROJECTIONS):
        if any(is_projection(layer, name) for layer in layers):
            return [name]
    return []


def _in_blocks(layer: str, layers: Sequence[str], model: nn.Module, blocks: Blocks) -> bool:
    where = place(layer)
    if where is None:
        return False
    if isinstance(blocks, list):
        return where.block in blocks
    container, block, _ = where
    total = _block_count(container, layer, layers, model)
    last = math.ceil(total / 4) if blocks == "last_quarter" else blocks
    return block >= total - last


def _block_count(container: str, layer: str, layers: Sequence[str], model: nn.Module) -> int:
    """Blocks in the container, from the model itself: adapters may leave the last blocks out."""
    path = place(resolve_layer(model, layer))
    try:
        module = model.get_submodule(path.container if path else container)
    except AttributeError:
        module = None
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return len(module)
    counts: dict[str, int] = defaultdict(int)
    for other in layers:
        if (p := place(other)) is not None:
            counts[p.container] = max(counts[p.container], p.block + 1)
    return counts[container]
