"""Which passes and tokens of an answer NSC counts: scripted answers, counted tokens, padding, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError, TargetError
from nscmerge.factors import LowRank
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC
from nscmerge.objectives.greedy import greedy_answer
from nscmerge.objectives.positions import step_weights
from tests.fakes.answers import TASKS, batch, causal, factors
from tests.oracles import dense_ratio

NEVER = []  # answers end at max_new_tokens alone
END = 2


@pytest.mark.parametrize(("prompt", "steps"), [(1, 1), (4, 1), (1, 5), (3, 2), (600, 128)])
def test_one_weighted_pass_is_the_mean_over_steps(prompt, steps):
    want = torch.zeros(prompt + steps - 1, dtype=torch.float64)
    for t in range(1, steps + 1):
        want[: prompt + t - 1] += 1 / (steps * (prompt + t - 1))
    got = step_weights(prompt, steps)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert got.sum().item() == pytest.approx(1, abs=1e-12)


class Scripted(nn.Module):
    """Says a script whatever it is asked; token i of width 4 has hidden state (i, 1, 0, 0). Notes every pass."""

    def __init__(self, scripts):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].v_proj = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.scripts, self.passes = scripts, []

    def forward(self, input_ids, attention_mask=None):
        self.passes.append(input_ids.tolist())
        hidden = torch.stack([input_ids.float(), *(torch.full_like(input_ids, i).float() for i in (1, 0, 0))], -1)
        self.layers[0].v_proj(hidden)
        logits = torch.zeros(*input_ids.shape, 50)
        for row, ids in enumerate(input_ids.tolist()):
            prompt, script = next((p, s) for p, s in self.scripts.items() if tuple(ids[: len(p)]) == p)
            logits[row, -1, script[len(ids) - len(prompt)]] = 1
        return SimpleNamespace(logits=logits)


def scripted(scripts, batch, **options):
    """Return the loss of a scripted model and its passes; one task with A = (0, 1, 0, 0): omega = i / sqrt(i^2 + 1)."""
    model = Scripted(scripts)
    experts = {"ask": {"layers.0.v_proj": LowRank(torch.tensor([[0.0, 1, 0, 0]]), torch.zeros(4, 1))}}
    objective = NSC(blocks=1, eos_token_id=END, **options)
    objective.prepare(model, experts)
    merged = attach(model, experts, Coefficients(["layers.0.v_proj"], ["ask"]))
    (group,) = fuse({"ask": batch})
    return objective.losses(merged, group)["ask"].item(), model.passes


def omega(*tokens):
    return sum(i / (i * i + 1) ** 0.5 for i in tokens) / len(tokens)


def test_the_script_decides_which_passes_count():
    script = {(5, 7): [9, 11, END, 13]}
    prompt = {"input_ids": torch.tensor([[5, 7]])}
    got, passes = scripted(script, prompt)
    assert got == pytest.approx(omega(5, 7), abs=1e-6)
    assert passes == [[[5, 7]]]
    got, passes = scripted(script, prompt, position="last_token")
    # The pass that emits the end counts; its own token is in no pass.
    assert got == pytest.approx(omega(5, 7, 9, 11), abs=1e-6)
    assert passes == [[[5, 7]], [[5, 7, 9]], [[5, 7, 9, 11]], [[5, 7, 9, 11]]]
    got, passes = scripted(script, prompt, position="full_sequence")
    assert got == pytest.approx((omega(5, 7) + omega(5, 7, 9) + omega(5, 7, 9, 11)) / 3, abs=1e-6)
    assert passes[-1] == [[5, 7, 9, 11]]
    for position in ("last_token", "full_sequence"):
        got, passes = scripted(script, prompt, position=position, max_new_tokens=1)
        assert got == pytest.approx(omega(5, 7), abs=1e-6)
        assert passes == [[[5, 7]], [[5, 7]]]  # one to see what is said, one to differentiate


def test_answers_of_unequal_length_share_one_pass():
    scripts = {(5, 7): [9, 11, END], (4, 4, 4): [END], (6,): [8, 8, 8, 8]}
    batch = {
        "input_ids": torch.tensor([[0, 5, 7], [4, 4, 4], [6, 0, 0]]),  # padded on the left, not, and on the right
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0]]),
    }
    each = [(5, 7, 9, 11), (4, 4, 4), (6, 8, 8)]
    got, passes = scripted(scripts, batch, position="last_token", max_new_tokens=3)
    assert got == pytest.approx(sum(omega(*own) for own in each) / 3, abs=1e-6)
    assert passes[-1] == [[5, 7, 9, 11], [4, 4, 4, 0], [6, 8, 8, 0]]
    assert len(passes) == 3 + 1 + 3 + 1
    got, _ = scripted(scripts, batch, position="full_sequence", max_new_tokens=3)
    steps = [[(5, 7), (5, 7, 9), (5, 7, 9, 11)], [(4, 4, 4)], [(6,), (6, 8), (6, 8, 8)]]
    assert got == pytest.approx(sum(sum(omega(*s) for s in own) / len(own) for own in steps) / 3, abs=1e-6)


def tokens_through_first_block(position, most):
    base = causal()
    objective = NSC(blocks=1, position=position, max_new_tokens=most, eos_token_id=NEVER)
    objective.prepare(base, factors(base))
    merged = attach(base, factors(base), Coefficients(sorted(factors(base)["ask"]), TASKS))
    counted = []
    base.model.layers[0].register_forward_pre_hook(lambda m, args: counted.append(args[0].shape[0] * args[0].shape[1]))
    (group,) = fuse(batch())
    objective.losses(merged, group)
    return sum(counted)


def test_the_cost_of_the_first_token_does_not_grow_with_the_answer():
    assert [tokens_through_first_block("first_token", most) for most in (1, 4, 64)] == [4 * 6] * 3
    for position in ("last_token", "full_sequence"):
        # Prompts of 4 + 6 + 3 + 5 tokens and 3 more of each answer, each once; then one padded pass with gradient.
        assert tokens_through_first_block(position, 4) == (18 + 4 * 3) + 4 * (6 + 3)


def test_a_cache_changes_no_answer():
    base = causal()
    prompt = {"input_ids": torch.tensor([[5, 9, 30, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with_cache = greedy_answer(base, prompt, eos=(), most=12)
    plain = nn.Module()
    plain.forward = lambda input_ids, attention_mask: base(input_ids=input_ids, attention_mask=attention_mask)
    seen = []
    hook = base.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    assert greedy_answer(plain, prompt, eos=(), most=12) == with_cache
    assert seen == list(range(4, 16))
    seen.clear()
    greedy_answer(base, prompt, eos=(), most=12)
    assert seen == [4, *[1] * 11]
    hook.remove()
    want = base.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=NEVER or None, pad_token_id=0)
    assert want[0, 4:].tolist() == with_cache


def test_padding_counts_as_in_the_authors_program_where_that_is_asked_for():
    """Each task alone, padded to its own longest sample, every position counted; padding of other tasks does not."""
    base = causal()
    own = factors(base)
    objective = NSC(blocks=1, mask_padding=False)
    objective.prepare(base, own)
    merged = attach(base, own, Coefficients(sorted(own["ask"]), TASKS))
    inputs = batch()
    inputs["ask"] = {
        n: v[:, :4] * (torch.arange(4) < 3 if n == "attention_mask" else 1) for n, v in inputs["ask"].items()
    }
    inputs["ask"]["attention_mask"][1] = 1
    (group,) = fuse(inputs)
    got = objective.losses(merged, group)
    masked = NSC(blocks=1)
    masked.prepare(base, own)
    for task, alone in inputs.items():
        # The second task has a column that is padding in both samples, which no tokenizer makes.
        alone = {n: v[:, 1:] if task == "tell" else v for n, v in alone.items()}
        captured = merged.capture(alone, objective.targets)
        want = torch.stack([dense_ratio(z, own[task][t].A).mean() for t, z in captured.items()]).mean()
        assert got[task].item() == pytest.approx(want.item(), rel=1e-6)
        assert got[task].item() != pytest.approx(masked.losses(merged, group)[task].item(), rel=1e-4)


def test_what_does_not_go_together_is_refused():
    for options, match in [
        ({"position": "full_sequence", "reduction": "flat"}, "this position needs buckets 1 and reduction 'sample'"),
        ({"position": "last_token", "buckets": 2}, "this position needs buckets 1"),
        ({"mask_padding": False, "buckets": 2}, "this mask_padding needs buckets 1"),
        ({"mask_padding": False, "position": "last_token"}, "leave mask_padding at true"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ]:
        with pytest.raises(ConfigError, match=match):
            NSC(**options)


def test_a_model_that_cannot_answer_says_so():
    torch.manual_seed(0)
    base = LlamaModel(causal().config).eval().requires_grad_(False)
    own = factors(base)
    objective = NSC(blocks=1, position="last_token", eos_token_id=3)
    objective.prepare(base, own)
    merged = attach(base, own, Coefficients(sorted(own["ask"]), TASKS))
    with pytest.raises(ConfigError, match=r"LlamaModel gives none\. Load the base model with its language head"):
        objective.losses(merged, fuse(batch())[0])
    base.config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"which token ends an answer, and LlamaModel does not say"):
        NSC(blocks=1, position="last_token").prepare(base, own)


def test_a_target_that_sees_no_tokens_cannot_be_weighed_by_token():
    model = Scripted({(5, 7): [END]})
    model.layers[0].v_proj = nn.Linear(4, 4, bias=False).requires_grad_(False)
    model.forward = lambda input_ids, attention_mask=None: (
        model.layers[0].v_proj(torch.ones(1, 4)),
        SimpleNamespace(logits=torch.nn.functional.one_hot(torch.full((1, 2), END), 50)),
    )[1]
    experts = {"ask": {"layers.0.v_proj": LowRank(torch.tensor([[0.0, 1, 0, 0]]), torch.zeros(4, 1))}}
    objective = NSC(blocks=1, eos_token_id=END, position="last_token")
    objective.prepare(model, experts)
    merged = attach(model, experts, Coefficients(["layers.0.v_proj"], ["ask"]))
    with pytest.raises(TargetError, match=r"'layers.0.v_proj' sees \(1, 4\), where the tokens are \(1, 2\)"):
        objective.losses(merged, fuse({"ask": {"input_ids": torch.tensor([[5, 7]])}})[0])
