"""Entropy of generated answers: of a tiny causal model, against its greedy answer and one plain graph for all steps."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nscmerge import Adapter, MergeModule
from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError
from nscmerge.factors import LowRank
from nscmerge.merged_linear import attach
from nscmerge.objectives import Entropy
from tests.fakes.answers import factors, t5
from tests.fakes.peft_folder import llama

TASKS = ("ask", "tell")
T5_NAMES = ("SelfAttention.q", "SelfAttention.v")
NEVER = 999  # no token: answers end at max_new_tokens


class NextToken(nn.Module):
    """Logits of the next token at every position; counts its passes."""

    outputs = "tokens"

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, model, inputs):
        logits = model(**inputs).logits
        self.passes.append(inputs["input_ids"].shape[1])
        return logits


class LastToken(NextToken):
    """Logits at the last position alone."""

    def forward(self, model, inputs):
        return super().forward(model, inputs)[:, -1]


def model():
    torch.manual_seed(3)
    return llama().double().eval().requires_grad_(False)


def experts(base):
    generator = torch.Generator().manual_seed(4)
    names = [n for n, m in base.named_modules() if n.endswith(("q_proj", "v_proj"))]
    return {
        task: {
            n: LowRank(
                torch.randn(rank, 32, generator=generator),
                torch.randn(base.get_submodule(n).out_features, rank, generator=generator) / 8,
                scaling=0.7,
            )
            for n in names
        }
        for rank, task in enumerate(TASKS, start=2)
    }


def batch():
    """Two prompts for each task, of 4, 6, 3 and 5 tokens; the second task pads on the left, as generation does."""
    ids = torch.randint(3, 40, (2, 2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[[1, 1, 1, 1, 0, 0], [1] * 6], [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]])
    return {t: {"input_ids": ids[k] * mask[k], "attention_mask": mask[k]} for k, t in enumerate(TASKS)}


def prompts(task):
    own = batch()[task]
    return [row[keep.bool()] for row, keep in zip(own["input_ids"], own["attention_mask"], strict=True)]


class Oracle:
    """Dense weights W0 + sum_k lambda_k delta_k; one fp64 lambda per layer and task."""

    def __init__(self):
        self.base = model()
        self.factors = experts(self.base)
        self.layers = sorted(self.factors["ask"])
        self.lam = torch.full((len(self.layers), 2), 0.4, dtype=torch.float64, requires_grad=True)

    def logits(self, tokens):
        weights = {
            f"{n}.weight": self.base.get_submodule(n).weight
            + sum(self.lam[i, k] * own[n].dense().double() for k, own in enumerate(self.factors.values()))
            for i, n in enumerate(self.layers)
        }
        return torch.func.functional_call(self.base, weights, kwargs={"input_ids": tokens[None]}).logits[0]

    def answer(self, prompt, eos, most):
        """Greedy tokens, the one that ends the answer included."""
        tokens = prompt
        with torch.no_grad():
            for _ in range(most):
                tokens = torch.cat([tokens, self.logits(tokens)[-1].argmax()[None]])
                if int(tokens[-1]) in eos:
                    break
        return tokens[len(prompt) :]

    def entropies(self, prompt, eos, most):
        """Entropy of every step, all in one graph: one causal pass over prompt and answer."""
        answer = self.answer(prompt, eos, most)
        p = self.logits(torch.cat([prompt, answer]))[len(prompt) - 1 : -1].softmax(-1)
        return -(p * p.log()).sum(-1)


def compare(objective, steps_of, reduce, eos, most):
    """Hold losses, report and gradients to the oracle; ``steps_of`` picks the steps that count."""
    oracle, inputs = Oracle(), batch()
    want, lengths = {}, {}
    for task in TASKS:
        answers = [oracle.entropies(prompt, eos, most) for prompt in prompts(task)]
        lengths[task] = [len(steps_of(a)) for a in answers]
        want[task] = torch.stack([reduce(steps_of(a)) for a in answers]).mean()
    sum(want.values()).backward()

    base = model()
    factors = experts(base)
    coefficients = Coefficients(oracle.layers, TASKS)
    objective.prepare(base, factors)
    merged = attach(base, factors, coefficients)
    (group,) = fuse(inputs)
    got = objective.losses(merged, group)
    numbers = {task: value.item() for task, value in want.items()}
    assert {task: value.item() for task, value in got.items()} == pytest.approx(numbers, rel=1e-6)
    # Every pass holds the prompt without padding and the answer so far.
    for task in TASKS:
        passes = [len(p) + step for p, n in zip(prompts(task), lengths[task], strict=True) for step in range(n)]
        assert objective.tasks[task].passes == passes
    objective.total(list(got.values())).backward()
    for row in range(len(oracle.layers)):
        torch.testing.assert_close(coefficients.lam[row].grad.double(), oracle.lam.grad[row], rtol=1e-5, atol=1e-6)
    assert oracle.lam.grad.abs().min() > 1e-4
    assert {task: value.item() for task, value in objective.report(merged, group).items()} == pytest.approx(numbers)
    return lengths


def heads(kind=NextToken):
    return {task: kind() for task in TASKS}


@pytest.mark.parametrize("kind", [NextToken, LastToken])
def test_first_token_reads_one_step(kind):
    lengths = compare(Entropy(heads(kind)), lambda a: a[:1], torch.sum, (), 1)
    assert lengths == {"ask": [1, 1], "tell": [1, 1]}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_full_token_reads_every_step_and_the_one_that_ends_the_answer(reduction):
    answer = Oracle().answer(prompts("ask")[0], (), 5).tolist()
    end = answer[2]
    stop = answer.index(end) + 1
    assert stop > 1
    objective = Entropy(heads(), "full_token", reduction, max_new_tokens=5, eos_token_id=end)
    lengths = compare(objective, lambda a: a, getattr(torch, reduction), (end,), 5)
    assert lengths["ask"][0] == stop
    assert max(n for own in lengths.values() for n in own) == 5  # some answer ends at max_new_tokens alone


@pytest.mark.parametrize("accumulate", ["fused", "task"])
def test_steps_of_the_trainer_equal_an_explicit_loop(accumulate, tmp_path):
    oracle = Oracle()
    optimizer = torch.optim.AdamW([oracle.lam], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        for task in TASKS:
            torch.stack([oracle.entropies(prompt, (), 4).sum() for prompt in prompts(task)]).mean().backward()
        optimizer.step()
    base = model()
    merge = MergeModule(
        base,
        {task: Adapter(layers=layers, name=task) for task, layers in experts(base).items()},
        objective=Entropy(heads(), "full_token", max_new_tokens=4, eos_token_id=NEVER),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        accumulate=accumulate,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(merge, DataLoader([batch()] * 3, batch_size=None))
    torch.testing.assert_close(merge.coefficients.matrix().double(), oracle.lam.detach(), rtol=0, atol=1e-5)
    assert (oracle.lam - 0.4).abs().min() > 1e-3


def test_an_answer_may_end_at_once():
    ends = [Oracle().answer(p, (), 1).item() for task in TASKS for p in prompts(task)]
    lengths = compare(Entropy(heads(), "full_token", eos_token_id=ends), lambda a: a, torch.sum, ends, 128)
    assert lengths == {"ask": [1, 1], "tell": [1, 1]}


def test_at_most_128_steps_by_default():
    objective = Entropy(heads(), "full_token", eos_token_id=NEVER)
    base = model()
    objective.prepare(base, {})
    merged = attach(base, experts(base), Coefficients(sorted(experts(base)["ask"]), TASKS))
    (group,) = fuse({"ask": {"input_ids": prompts("ask")[0][None]}})  # no mask: every token counts
    objective.report(merged, group)
    assert objective.tasks["ask"].passes == list(range(4, 132))


def test_tasks_are_summed_where_one_generates_unless_told_otherwise():
    losses = [torch.tensor(1.0), torch.tensor(2.0)]
    assert Entropy(heads()).total(losses) == 3
    assert Entropy(heads(), task_reduction="mean").total(losses) == 1.5


def test_the_model_says_what_ends_an_answer_or_somebody_must():
    base = model()
    objective = Entropy(heads(), "full_token")
    base.generation_config.eos_token_id = [7, 8]
    objective.prepare(base, {})
    assert objective.options()["eos_token_id"] == [7, 8]
    base.generation_config.eos_token_id, base.config.eos_token_id = None, 9
    objective.prepare(base, {})
    assert objective.options()["eos_token_id"] == [9]
    base.config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"which token ends an answer, and LlamaForCausalLM.*eos_token_id"):
        objective.prepare(base, {})
    Entropy(heads()).prepare(base, {})  # one token needs no end
    Entropy(heads(), "full_token", eos_token_id=[]).prepare(base, {})


def test_what_cannot_grow_is_refused():
    base = model()
    merged = attach(base, experts(base), Coefficients(sorted(experts(base)["ask"]), TASKS))
    objective = Entropy(heads(), "full_token", eos_token_id=NEVER)
    objective.prepare(base, {})
    ids = prompts("ask")[0][None]
    (group,) = fuse({"ask": {"input_ids": ids, "position_ids": torch.arange(4)[None]}})
    with pytest.raises(ConfigError, match=r"input 'position_ids', \(1, 4\), goes on with a new token"):
        objective.report(merged, group)
    (group,) = fuse({"ask": {"inputs_embeds": torch.zeros(1, 4, 32, dtype=torch.float64)}})
    objective.tasks["ask"].forward = lambda model, inputs: model(**inputs).logits
    with pytest.raises(ConfigError, match=r"grows the input 'input_ids', which is not among \['inputs_embeds'\]"):
        objective.report(merged, group)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        Entropy(heads(), max_new_tokens=0)


def test_logits_of_several_samples_for_one_are_refused():
    base = model()
    merged = attach(base, experts(base), Coefficients(sorted(experts(base)["ask"]), TASKS))
    objective = Entropy(heads())
    objective.tasks["ask"].forward = lambda model, inputs: torch.zeros(3, 4)
    (group,) = fuse({"ask": batch()["ask"]})
    with pytest.raises(ConfigError, match=r"task 'ask': its output for one sample is \(3, 4\)"):
        objective.losses(merged, group)


def test_a_decoder_is_followed_from_its_start_token():
    """Encoder-decoder: the gradient of the explicit sum of entropies over one teacher-forced pass, dense weights."""
    base = t5()
    own = factors(base, T5_NAMES)
    layers = sorted(own["ask"])
    lam = torch.full((len(layers), 2), 0.4, dtype=torch.float64, requires_grad=True)

    def logits(ids, decoder_ids):
        weights = {
            f"{n}.weight": base.get_submodule(n).weight
            + sum(lam[i, k] * e[n].dense().double() for k, e in enumerate(own.values()))
            for i, n in enumerate(layers)
        }
        inputs = {"input_ids": ids, "decoder_input_ids": decoder_ids}
        return torch.func.functional_call(base, weights, kwargs=inputs).logits[0]

    want = {}
    for task in TASKS:
        sums = []
        for prompt in prompts(task):
            said = torch.zeros(1, 1, dtype=torch.long)
            with torch.no_grad():
                for _ in range(4):
                    said = torch.cat([said, logits(prompt[None], said)[-1:].argmax(-1)[None]], 1)
            p = logits(prompt[None], said[:, :-1]).softmax(-1)
            sums.append(-(p * p.log()).sum())
        want[task] = torch.stack(sums).mean()
    sum(want.values()).backward()

    coefficients = Coefficients(layers, TASKS)
    objective = Entropy(heads(), "full_token", max_new_tokens=4, eos_token_id=NEVER)
    objective.prepare(base, own)
    merged = attach(base, own, coefficients)
    got = objective.losses(merged, fuse(batch())[0])
    numbers = {task: value.item() for task, value in want.items()}
    assert {task: value.item() for task, value in got.items()} == pytest.approx(numbers, rel=1e-6)
    objective.total(list(got.values())).backward()
    for row in range(len(layers)):
        torch.testing.assert_close(coefficients.lam[row].grad.double(), lam.grad[row], rtol=1e-5, atol=1e-6)
    assert lam.grad.abs().min() > 1e-6
