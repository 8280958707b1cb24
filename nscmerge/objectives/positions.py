"""Which forward passes and tokens of an answer the null-space ratio counts (Table 8 of NSC).

With a causal model the passes of a greedy answer are prefixes of one another: a token's hidden state is the same in
every pass that holds it. So one pass over the prompt and all answer tokens but the last gives every variant; what
differs is how its tokens are weighed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from nscmerge.batching import MASK, Group, fuse
from nscmerge.objectives.greedy import DECODER_IDS, append, greedy_answer, grows, start_decoder

Position = Literal["first_token", "last_token", "full_sequence"]


def step_weights(prompt: int, steps: int) -> Tensor:
    """Return the weight of every token in the mean over steps of the mean over that step's tokens, fp64, sum 1.

    Step t of T reads the first L + t - 1 tokens, so token p counts sum over t >= p - L + 1 of 1 / (T (L + t - 1)).

    Args:
        prompt: L, tokens before the answer, 1 at least.
        steps: T, tokens of the answer, 1 at least.

    Returns:
        (L + T - 1,).
    """
    each = 1 / (steps * torch.arange(prompt, prompt + steps, dtype=torch.float64))  # (T,), of steps 1 .. T
    later = each.flip(0).cumsum(0).flip(0)  # by first step that holds the token
    return torch.cat([later[:1].expand(prompt), later[1:]])


def with_answers(
    model: nn.Module, group: Group, eos: Collection[int], most: int, *, together: bool = False
) -> tuple[Group, dict[str, list[tuple[int, int]]]]:
    """Return the group with every sample's greedy answer but its last token, padded on the right.

    Args:
        model: Gives logits.
        group: Fused prompts; they lose their own padding.
        eos: Tokens that end an answer.
        most: Tokens of an answer at most.
        together: Processes share the model, and run as many passes as the longest of their answers asks for.

    Returns:
        The group, and ``{input name: (L, T) of every row}`` for the inputs that run along tokens: prompt tokens and
        steps. An encoder's input has T = 1, for every step reads all of it.
    """
    rows: list[Mapping[str, Tensor]] = []
    lengths: dict[str, list[tuple[int, int]]] = {}
    for row in range(len(next(iter(group.inputs.values())))):
        inputs = start_decoder(model, group.part(slice(row, row + 1)))
        key = grows(inputs)
        answer = greedy_answer(model, inputs, eos=eos, most=most, together=together)
        lengths.setdefault(key, []).append((inputs[key].shape[1], len(answer)))
        if key == DECODER_IDS and MASK in inputs:
            lengths.setdefault(MASK, []).append((inputs[MASK].shape[1], 1))
        rows.append(append(inputs, answer[:-1]))
    key = grows(rows[0])
    if key != DECODER_IDS:
        # Answers differ in length, so the padding behind them must be known.
        rows = [{MASK: torch.ones_like(own[key]), **own} for own in rows]
    whole = _stack(rows, key)
    (grown,) = fuse({tuple(tasks): {n: v[span] for n, v in whole.items()} for span, tasks in group.owners})
    return grown, lengths


def token_weights(lengths: list[tuple[int, int]], width: int, position: Position, device: torch.device) -> Tensor:
    """Return how much every token of every row counts, (N, width) fp32, rows sum to 1; 0 for padding.

    Args:
        lengths: (L, T) of every row, as :func:`with_answers` gives them.
        width: Tokens of the padded batch.
        position: ``last_token`` or ``full_sequence``.
        device: Where the weights are wanted.
    """
    weights = torch.zeros(len(lengths), width)
    for row, (prompt, steps) in enumerate(lengths):
        used = prompt + steps - 1
        weights[row, :used] = step_weights(prompt, steps) if position == "full_sequence" else 1 / used
    return weights.to(device)


def own_width(group: Group) -> Tensor | None:
    """Return the tokens of each task's own padded batch, bool (N, T): its padding counts, that of other tasks not."""
    if group.mask is None:
        return None
    found = torch.zeros_like(group.mask)
    for rows, _ in group.owners:
        places = group.mask[rows].any(0).nonzero()
        if len(places):
            found[rows, int(places[0]) : int(places[-1]) + 1] = True
    return found


def _stack(rows: list[Mapping[str, Tensor]], key: str) -> dict[str, Tensor]:
    """Return the rows one below the other, what runs along tokens padded on the right with 0."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in (key, MASK) or (values[0].ndim == 2 and len({v.shape[1] for v in values}) > 1):
            width = max(v.shape[1] for v in values)
            values = [nn.functional.pad(v, (0, width - v.shape[1])) for v in values]
        found[name] = torch.cat(values)
    return found
