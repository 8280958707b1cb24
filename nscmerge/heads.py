"""Many heads on one backbone: heads that read the same of it have it run once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from torch import Tensor, nn


def predictions(
    model: nn.Module, heads: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (task, prediction) on the same inputs, one run of the backbone for all heads whose ``reads()`` are equal.

    Args:
        model: Backbone.
        heads: By task: modules with ``features``, ``predict`` and ``reads`` as :class:`tasks.base.Task` has them; a
            module without them is called as ``head(model, inputs)``, a run of its own.
        inputs: Keyword arguments of the backbone.
    """
    found: dict[Hashable, Tensor] = {}
    for name, head in heads.items():
        if not all(hasattr(head, part) for part in ("features", "predict", "reads")):
            yield name, head(model, inputs)
            continue
        key = head.reads()  # type: ignore[operator]
        if key not in found:
            found[key] = head.features(model, inputs)  # type: ignore[operator]
        yield name, head.predict(found[key], inputs)  # type: ignore[operator]
