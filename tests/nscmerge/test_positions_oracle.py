"""Positions of NSC against oracles that run every step of an answer: dense weights, hooks, the explicit projector."""

import pytest
import torch

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC
from tests.fakes.answers import TASKS, batch, causal, factors, t5
from tests.oracles import dense_ratio


class Steps:
    """Oracle: dense weights, every step of an answer a pass of its own with hooks, the explicit projector."""

    def __init__(self, base, names=("q_proj", "v_proj")):
        self.base, self.factors = base, factors(base, names)
        self.layers = sorted(self.factors["ask"])
        self.lam = torch.full((len(self.layers), 2), 0.4, dtype=torch.float64, requires_grad=True)

    def run(self, **inputs):
        weights = {
            f"{n}.weight": self.base.get_submodule(n).weight
            + sum(self.lam[i, k] * own[n].dense().double() for k, own in enumerate(self.factors.values()))
            for i, n in enumerate(self.layers)
        }
        return torch.func.functional_call(self.base, weights, kwargs=inputs)

    def omegas(self, task, targets, eos, most, **prompt):
        """Omega of every step: mean over targets of the mean over that pass's tokens."""
        grown = "decoder_input_ids" if "decoder_input_ids" in prompt else "input_ids"
        found = []
        for _ in range(most):
            seen = {}
            hooks = [
                self.base.get_submodule(t).register_forward_pre_hook(
                    lambda m, a, t=t, seen=seen: seen.__setitem__(t, a[0])
                )
                for t in targets
            ]
            logits = self.run(**prompt).logits
            for hook in hooks:
                hook.remove()
            found.append(torch.stack([dense_ratio(seen[t], self.factors[task][t].A).mean() for t in targets]).mean())
            token = logits[0, -1].argmax()
            if int(token) in eos:
                break
            prompt[grown] = torch.cat([prompt[grown], token[None, None]], 1)
        return torch.stack(found)


COUNTED = {
    "first_token": lambda steps: steps[0],
    "last_token": lambda steps: steps[-1],
    "full_sequence": lambda steps: steps.mean(),
}


def compare(base, oracle, prompts, eos, position, inputs):
    """Hold losses and all gradients to the oracle; return the lengths of the answers."""
    objective = NSC(blocks=1, position=position, max_new_tokens=5, eos_token_id=eos)
    objective.prepare(base, oracle.factors)
    steps = {t: [oracle.omegas(t, objective.targets, eos, 5, **dict(p)) for p in prompts[t]] for t in TASKS}
    want = {t: torch.stack([COUNTED[position](own) for own in steps[t]]).mean() for t in TASKS}
    torch.stack(list(want.values())).mean().backward()
    coefficients = Coefficients(oracle.layers, TASKS)
    merged = attach(base, oracle.factors, coefficients)
    (group,) = fuse(inputs)
    got = objective.losses(merged, group)
    numbers = {t: v.item() for t, v in want.items()}
    assert {t: v.item() for t, v in got.items()} == pytest.approx(numbers, rel=2e-6)
    assert {t: v.item() for t, v in objective.report(merged, group).items()} == pytest.approx(numbers, rel=2e-6)
    torch.stack(list(got.values())).mean().backward()
    for row in range(len(oracle.layers)):
        mine = coefficients.lam[row].grad
        mine = torch.zeros(2) if mine is None else mine
        torch.testing.assert_close(mine.double(), oracle.lam.grad[row], rtol=1e-4, atol=1e-7)
    assert oracle.lam.grad.abs().max() > 1e-4
    return {t: [len(own) for own in lengths] for t, lengths in steps.items()}


@pytest.mark.parametrize("position", COUNTED)
def test_loss_and_gradient_are_those_of_the_explicit_steps(position):
    oracle = Steps(causal())
    prompts = {
        t: [
            {"input_ids": ids[keep.bool()][None]} for ids, keep in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]
        for t, b in batch().items()
    }
    with torch.no_grad():  # some answer shall end early, by a token that it does emit
        tokens = prompts["ask"][0]["input_ids"]
        for _ in range(3):
            tokens = torch.cat([tokens, oracle.run(input_ids=tokens).logits[:, -1].argmax(-1)[None]], 1)
    lengths = compare(causal(), oracle, prompts, [int(tokens[0, -1])], position, batch())
    both = {n for own in lengths.values() for n in own}
    assert len(both) > 1
    assert max(both) == 5


@pytest.mark.parametrize("position", COUNTED)
def test_an_encoder_is_read_whole_and_its_decoder_step_by_step(position):
    names = ("SelfAttention.q", "SelfAttention.v")
    oracle = Steps(t5(), names)
    start = torch.zeros(1, 1, dtype=torch.long)
    prompts = {
        t: [
            {"input_ids": ids[keep.bool()][None], "decoder_input_ids": start}
            for ids, keep in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]
        for t, b in batch().items()
    }
    compare(t5(), oracle, prompts, [1], position, batch())
