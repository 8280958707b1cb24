"""Recomputed blocks: same numbers, which blocks run twice, a pass that is cut short, caches, undoing."""

import pytest
import torch
from torch import nn

from nscmerge import MergeModule, Pretrained
from nscmerge.batching import fuse
from nscmerge.checkpointing import blocks, checkpoint_blocks
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC, Entropy
from nscmerge.objectives.greedy import greedy_answer
from tests.fakes.answers import t5
from tests.fakes.fit_llama import TASKS, adapters, llama


def batch():
    generator = torch.Generator().manual_seed(5)
    return {
        task: {"input_ids": torch.randint(3, 40, (2, 5 + k), generator=generator)}
        | {"attention_mask": torch.ones(2, 5 + k, dtype=torch.long)}
        for k, task in enumerate(TASKS)
    }


class NextToken(nn.Module):
    outputs = "tokens"

    def forward(self, model, inputs):
        return model(**inputs).logits


def gradients(model, objective, recompute):
    """Return losses, gradients, and how often each block ran, forward and backward."""
    own = {t: a.layers for t, a in adapters(model).items()}
    coefficients = Coefficients(sorted(own["a"]), TASKS)
    objective.prepare(model, own)
    merged = attach(model, own, coefficients)
    undo = checkpoint_blocks(model) if recompute else None
    runs = [0] * 4
    for i, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_pre_hook(lambda m, a, i=i: runs.__setitem__(i, runs[i] + 1))
    losses = objective.losses(merged, fuse(batch())[0])
    objective.total(list(losses.values())).backward()
    if undo is not None:
        undo()
    found = [torch.zeros(len(TASKS)) if lam.grad is None else lam.grad for lam in coefficients.lam]
    return torch.stack(list(losses.values())).detach(), torch.stack(found), runs


@pytest.mark.parametrize(
    ("objective", "runs"),
    [
        (lambda: NSC(blocks=[1, 3]), [2, 1, 2, 1]),  # what the objective reads from runs once
        (lambda: NSC(blocks=1), [2, 2, 2, 1]),
        (lambda: NSC(blocks=[2]), [2, 2, 1, 0]),  # the last block has no say
        (lambda: Entropy({task: NextToken() for task in TASKS}), [12] * 4),  # six samples, each of them twice
    ],
)
def test_same_numbers_from_blocks_that_run_twice(objective, runs):
    want, slopes, once = gradients(llama(), objective(), recompute=False)
    got, recomputed, counted = gradients(llama(), objective(), recompute=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, slopes, rtol=0, atol=0)
    assert slopes.abs().max() > 1e-4
    assert counted == runs
    assert sum(once) < sum(counted)


def test_less_is_kept_for_the_backward_pass():
    kept = {}
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            gradients(llama(), NSC(blocks=1), recompute)
        kept[recompute] = sum(sizes)
    # Weights are counted where they are saved; what recomputed blocks save is not, but their inputs.
    assert kept[True] < 0.5 * kept[False]


def test_a_cache_is_kept_without_gradient_and_left_out_with():
    model = llama()
    prompt = {"input_ids": torch.tensor([[5, 9, 30, 8]])}
    want = greedy_answer(model, prompt, eos=(), most=6)
    undo = checkpoint_blocks(model)
    assert greedy_answer(model, prompt, eos=(), most=6) == want
    embeddings = model.get_input_embeddings()(prompt["input_ids"]).requires_grad_()
    out = model(inputs_embeds=embeddings, use_cache=True)
    out.logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert out.past_key_values.get_seq_length() == 0
    undo()
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_blocks_are_the_outermost_lists_of_equal_modules():
    assert list(blocks(llama())) == [f"model.layers.{i}" for i in range(4)]
    assert list(blocks(t5())) == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]
    with pytest.raises(ConfigError, match="Linear has no repeated blocks to recompute; switch"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_the_base_model_says_whether_blocks_are_recomputed(tmp_path):
    llama().save_pretrained(tmp_path)
    for checkpointing in (False, True):
        base = Pretrained(str(tmp_path), "AutoModelForCausalLM", checkpointing=checkpointing)
        merge = MergeModule(base, adapters(llama()), objective=NSC(blocks=1))
        merge.configure_model()
        assert all(("forward" in block.__dict__) == checkpointing for block in merge.base.model.layers)
