"""Which entries DARE keeps: masks drawn per task and name, or given by the caller and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nscmerge.draws import generator
from nscmerge.errors import MethodError
from nscmerge.methods.options import check_number, check_whole
from nscmerge.methods.ties_space import Space
from nscmerge.methods.ties_steps import drop_entries
from nscmerge.naming import nearest
from nscmerge.stack import Stack

#: By task, then by layer or whole tensor: True where an entry is kept.
Masks = Mapping[str, Mapping[str, Tensor]]
#: (task, name, tensor) -> bool mask of its shape.
Mask = Callable[[str, str, Tensor], Tensor]


def dropped(space: Space, mask: Mask, drop: float) -> Space:
    """Return the space with the entries outside the mask set to 0 and the rest divided by 1 - drop."""
    return space.changed(lambda task, name, v: drop_entries(v, mask(task, name, v), drop))


def mask_source(
    method: str, stack: Stack, spaces: Sequence[Space], *, drop: float, seed: int, keep_masks: Masks | None
) -> Mask:
    """Return where masks come from: ``keep_masks`` if given, else draws from (seed, method, task, name) alone.

    Args:
        method: Name of the method, which the draws depend on and messages mention.
        stack: The adapters; no mask is needed for a layer that a task lacks.
        spaces: Everything that has to be masked.
        drop: Chance of an entry to be dropped, in [0, 1).
        seed: Of the draws.
        keep_masks: By task, then by name; bool, or 0 and 1, of the shapes that the spaces say.

    Raises:
        MethodError: ``drop`` or ``seed`` is out of range; masks are missing, misshapen or of something unknown.
    """
    check_number(method, "drop", drop, "[0, 1)")
    check_whole(method, "seed", seed)
    if keep_masks is None:
        return _drawn(method, seed, drop)
    lacking = {
        (task, layer)
        for layer, experts in stack.layers.items()
        for task, expert in zip(stack.tasks, experts, strict=True)
        if expert.rank == 0
    }
    shapes = {name: shape for space in spaces for name, shape in space.shapes.items()}
    where = f"{method}: keep_masks"
    _check_names(where, "task", keep_masks, stack.tasks, stack.tasks)
    for task in stack.tasks:
        needed = [name for name in shapes if (task, name) not in lacking]
        _check_names(f"{where}['{task}']", "layer or tensor", keep_masks[task], needed, list(shapes))
        for name, mask in keep_masks[task].items():
            _check_mask(f"{where}['{task}']['{name}']", mask, shapes[name])
    return _given(keep_masks)


def _drawn(method: str, seed: int, drop: float) -> Mask:
    def mask(task: str, name: str, like: Tensor) -> Tensor:
        # Uniform numbers rather than bernoulli_, whose draws depend on whether torch was built with MKL.
        draws = torch.rand(like.shape, generator=generator(seed, method, task, name))
        return (draws >= drop).to(like.device)

    return mask


def _given(masks: Masks) -> Mask:
    def mask(task: str, name: str, like: Tensor) -> Tensor:
        keep = masks[task].get(name)
        # Only the zeros of a layer that the task lacks have no mask.
        return torch.zeros_like(like, dtype=torch.bool) if keep is None else keep.to(like.device, torch.bool)

    return mask


def _check_names(where: str, what: str, given: object, needed: Sequence[str], known: Sequence[str]) -> None:
    """Raise unless ``given`` is a mapping with every needed name and no unknown one."""
    if not isinstance(given, Mapping):
        raise MethodError(f"{where} is a {type(given).__name__}; expected a mapping by {what} name.")
    if extra := [name for name in given if name not in known]:
        raise MethodError(
            f"{where} has '{extra[0]}', which is no {what} of this merge{nearest(str(extra[0]), known) or ';'} "
            f"Known: {_listed(known)}."
        )
    if missing := [name for name in needed if name not in given]:
        raise MethodError(
            f"{where} has no {what} '{missing[0]}' ({len(missing)} of {len(needed)} are missing); give one for each of "
            f"{_listed(needed)}, or none at all and a seed."
        )


def _check_mask(where: str, mask: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is a tensor of that shape that says yes or no."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise MethodError(f"{where} is {got}; expected a bool tensor {shape}, True where an entry is kept.")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise MethodError(
            f"{where} is {mask.dtype} with values other than 0 and 1; expected bool, True where an entry is kept."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
