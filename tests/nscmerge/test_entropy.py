"""Entropy of classes: against dense weights and an explicit softmax, through the Trainer, and what is refused."""

import math
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from nscmerge import Adapter, MergeModule, save_adapter
from nscmerge.batching import fuse
from nscmerge.cli import main
from nscmerge.coefficients import Coefficients
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.merged_linear import attach
from nscmerge.objectives import Entropy
from nscmerge.objectives.entropy import entropy
from tasks.classification import TextClassification
from tasks.regression import TextRegression
from tests.fakes.fit_merge import STEPS, TASKS, adapters, data, heads, module
from tests.fakes.text_tasks import WIDTH, tiny_bert

CLASSES = (2, 3, 5)
ROOT = Path(__file__).parents[2]


def experts(model):
    """Adapters in memory that hold the heads, as an expert folder does."""
    own = heads()
    return {
        t: Adapter(a.layers, "tiny", head=dict(own[t].state_dict()), name=t, source="somewhere")
        for t, a in adapters(model).items()
    }


def batch(seed, lengths=(5, 9, 7), rows=(2, 3, 1)):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k, (task, length, n) in enumerate(zip(TASKS, lengths, rows, strict=True)):
        mask = torch.ones(n, length, dtype=torch.long)
        mask[0, length - k :] = 0  # padding inside a task's own batch, too
        ids = torch.randint(1, 50, (n, length), generator=generator)
        made[task] = {"input_ids": ids * mask, "attention_mask": mask}
    return made


def oracle(model, tasks, factors, lam, inputs):
    """{task: -mean sum p log p} with W0 + sum_k lambda_k s_k B_k A_k, one pass per task; ``lam`` (L, K), fp64."""
    layers = sorted(next(iter(factors.values())))
    weights = {
        f"{layer}.weight": model.get_submodule(layer).weight
        + sum(lam[i, k] * own[layer].dense().double() for k, own in enumerate(factors.values()))
        for i, layer in enumerate(layers)
    }
    found = {}
    for task, own in inputs.items():
        logits = tasks[task](lambda **x: torch.func.functional_call(model, weights, kwargs=x), own)
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        found[task] = -(p * p.log()).sum(-1).mean()
    return found


def exact():
    """Model and heads in fp64, the experts' factors, and their layers."""
    model, tasks = tiny_bert().double(), {t: head.double() for t, head in heads().items()}
    factors = {t: a.layers for t, a in adapters(model).items()}
    return model, tasks, factors, sorted(factors["a"])


def merged(model, tasks, factors, **options):
    objective, coefficients = Entropy(tasks), Coefficients(sorted(factors["a"]), tuple(tasks), **options)
    objective.prepare(model, factors)
    return attach(model, factors, coefficients), objective, coefficients


def test_losses_and_all_gradients_equal_the_dense_oracle():
    model, tasks, factors, layers = exact()
    inputs = batch(1)
    lam = torch.full((len(layers), 3), 0.4, dtype=torch.float64, requires_grad=True)
    want = oracle(model, tasks, factors, lam, inputs)
    assert all(0.02 * math.log(c) < v < 0.99 * math.log(c) for c, v in zip(CLASSES, want.values(), strict=True))
    torch.stack(list(want.values())).mean().backward()

    handle, objective, coefficients = merged(model, tasks, factors)
    (group,) = fuse(inputs)
    got = objective.losses(handle, group)
    assert {t: v.item() for t, v in got.items()} == pytest.approx({t: v.item() for t, v in want.items()}, rel=1e-6)
    assert objective.report(handle, group) == pytest.approx({t: v.item() for t, v in want.items()}, rel=1e-6)
    objective.total(list(got.values())).backward()
    for row in range(len(layers)):
        # fp32 coefficients: gradients are rounded once.
        torch.testing.assert_close(coefficients.lam[row].grad.double(), lam.grad[row], rtol=1e-5, atol=1e-7)
        assert lam.grad[row].abs().min() > 1e-6  # the last block's own coefficients are reached, too


def test_a_clamped_coefficient_has_no_gradient_outside_and_the_oracle_s_inside():
    model, tasks, factors, layers = exact()
    start = torch.linspace(-0.3, 1.3, len(layers) * 3, dtype=torch.float64).reshape(-1, 3)
    clamped = start.clamp(0, 1).requires_grad_()
    torch.stack(list(oracle(model, tasks, factors, clamped, batch(2)).values())).mean().backward()
    handle, objective, coefficients = merged(model, tasks, factors, bounds=(0.0, 1.0))
    with torch.no_grad():
        for row, values in zip(coefficients.lam, start, strict=True):
            row.copy_(values)
    objective.total(list(objective.losses(handle, fuse(batch(2))[0]).values())).backward()
    got = torch.stack([row.grad for row in coefficients.lam]).double()
    inside = (start > 0) & (start < 1)
    assert not got[~inside].any()
    assert (~inside).sum() > 5
    torch.testing.assert_close(got[inside], clamped.grad[inside], rtol=1e-4, atol=1e-6)


def fit(steps, folder, loader, **options):
    """A fit without console, checkpoint or logger."""
    model = tiny_bert()
    merge = MergeModule(model, experts(model), **{"objective": Entropy(heads())} | options)
    lightning.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=2, check_val_every_n_epoch=None,
    ).fit(merge, loader, loader)  # fmt: skip
    return merge


@pytest.mark.parametrize("accumulate", ["fused", "task"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_five_steps_equal_an_explicit_loop(accumulate, reduction, tmp_path):
    model, tasks, factors, layers = exact()
    batches = [batch(seed) for seed in range(5)]
    lam = torch.full((len(layers), 3), 0.4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([lam], lr=1e-2)
    for inputs in batches:
        optimizer.zero_grad()
        values = torch.stack(list(oracle(model, tasks, factors, lam, inputs).values()))
        getattr(values, reduction)().backward()
        optimizer.step()
    got = fit(
        5, tmp_path, DataLoader(batches, batch_size=None), accumulate=accumulate,
        objective=Entropy(heads(), task_reduction=reduction), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )  # fmt: skip
    torch.testing.assert_close(got.coefficients.matrix().double(), lam.detach(), rtol=0, atol=2e-5)
    assert (lam - 0.4).abs().max() > 0.02
    assert got.unreached == []


def learned(folder, resume=None, **options):
    """The fit of ``tests.fakes.fit_merge``, in this process."""
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)],
        val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    merge = module(objective=Entropy(heads()), **options)
    trainer.fit(merge, data(), ckpt_path=resume)
    return merge


@pytest.mark.slow  # the fast suite has the same of plain NSC
def test_resumed_and_in_two_processes_it_learns_the_same(tmp_path):
    whole = learned(tmp_path)
    again = learned(tmp_path / "again", tmp_path / "step=3.ckpt")
    assert torch.equal(again.coefficients.matrix(), whole.coefficients.matrix())
    assert again.validation_ratios == whole.validation_ratios
    command = [sys.executable, "-m", "tests.fakes.fit_merge", tmp_path / "out.pt", tmp_path / "ddp"]
    done = subprocess.run(
        [*map(str, command), "--devices", "2", "--objective", "entropy"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(got["lam"], whole.coefficients.matrix(), rtol=0, atol=1e-5)
    assert got["ratios"] == pytest.approx(whole.validation_ratios, abs=1e-5)
    assert (got["lam"] - 0.4).abs().max() > 0.01


def test_what_is_reported_is_called_entropy(tmp_path, capsys):
    merge = fit(2, tmp_path, DataLoader([batch(0)] * 2, batch_size=None))
    assert {"entropy/a", "val/entropy/a", "val/entropy"} <= merge.trainer.callback_metrics.keys()
    assert not [name for name in merge.trainer.callback_metrics if "omega" in name]
    assert "entropy at start" in capsys.readouterr().out
    recipe = merge.update().recipe
    assert recipe.method == "entropy"
    assert set(recipe.extra["validation_entropy_at_end"]) == set(TASKS)
    assert recipe.options["objective"]["task_reduction"] == "mean"
    assert recipe.options["objective"]["tasks"]["a"] == "tasks.classification.TextClassification"


@pytest.mark.parametrize("classes", [2, 5])
def test_entropy_and_its_gradient_at_the_edges(classes):
    flat = torch.zeros(classes, requires_grad=True)
    sure = torch.tensor([1000.0, *[0.0] * (classes - 1)], requires_grad=True)
    masked = torch.tensor([0.3, -math.inf, -0.5, 1.0, -math.inf], requires_grad=True)
    short = torch.tensor([0.3, -0.5, 1.0], requires_grad=True)
    values = [entropy(z) for z in (flat, sure, masked, short)]
    for value in values:
        value.backward()
    assert values[0].item() == pytest.approx(math.log(classes), rel=1e-6)
    assert values[1].item() == 0
    assert values[2].item() == values[3].item()
    for logits in (flat, sure):
        torch.testing.assert_close(logits.grad, torch.zeros(classes), rtol=0, atol=1e-7)
    torch.testing.assert_close(masked.grad[[0, 2, 3]], short.grad, rtol=0, atol=0)
    assert not masked.grad[[1, 4]].any()
    p = short.detach().double().softmax(0)
    want = -p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(short.grad.double(), want, rtol=1e-6, atol=1e-7)


def test_half_precision_logits_are_summed_in_fp32():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert entropy(logits).dtype == torch.float32
    torch.testing.assert_close(entropy(logits), entropy(logits.double()).float(), rtol=1e-6, atol=0)


def test_a_bf16_trainer_keeps_heads_in_fp32():
    model = tiny_bert()
    merge = MergeModule(model, experts(model), objective=Entropy(heads()), dtype="bfloat16")
    merge.configure_model()
    merge.bfloat16()
    assert {p.dtype for p in merge.objective.parameters()} == {torch.float32}
    losses = merge.objective.losses(merge.merged, fuse(batch(1))[0])
    assert all(torch.isfinite(value) for value in losses.values())


def test_heads_come_from_the_experts_and_the_given_modules_stay_as_they_are():
    shared = TextClassification(2, WIDTH)
    before = shared.linear.weight.clone()
    model = tiny_bert()
    pair = {t: Adapter(a.layers, "tiny", head=heads()["a"].state_dict()) for t, a in adapters(model).items()}
    pair["b"] = Adapter(pair["b"].layers, "tiny", head=shared.state_dict())
    objective = MergeModule(model, pair, objective=Entropy(dict.fromkeys(TASKS, shared))).objective
    assert torch.equal(objective.tasks["a"].linear.weight, heads()["a"].linear.weight)
    assert torch.equal(objective.tasks["b"].linear.weight, before)
    assert torch.equal(shared.linear.weight, before)
    assert not any(p.requires_grad for p in objective.parameters())
    assert not objective.train().training


def test_regression_is_refused_before_the_base_loads():
    own = experts(tiny_bert())
    tasks = heads() | {"b": TextRegression(WIDTH)}
    with pytest.raises(ConfigError, match=r"undefined for regression: the tasks \['b'\] .*nscmerge.objectives.NSC"):
        MergeModule("not/there", own, objective=Entropy(tasks))


def test_what_the_outputs_are_must_be_said():
    own = experts(tiny_bert())
    with pytest.raises(ConfigError, match=r"task 'c': Linear.outputs is None; entropy needs logits"):
        MergeModule("not/there", own, objective=Entropy(heads() | {"c": nn.Linear(2, 2)}))
    two = {t: task for t, task in heads().items() if t != "a"} | {"z": heads()["a"]}
    with pytest.raises(ConfigError, match=r"only experts: \['a'\], only objective: \['z'\]"):
        MergeModule("not/there", own, objective=Entropy(two))


def test_one_class_is_no_classification():
    model = tiny_bert()
    merge = MergeModule(model, adapters(model), objective=Entropy(heads() | {"b": TextClassification(1, WIDTH)}))
    merge.configure_model()
    with pytest.raises(ConfigError, match=r"task 'b': its output is \(3, 1\); entropy needs logits of two classes"):
        merge.objective.losses(merge.merged, fuse(batch(1))[0])


def test_an_expert_on_disk_without_its_head_is_refused(tmp_path):
    for task, adapter in adapters(tiny_bert()).items():
        save_adapter(adapter, tmp_path / task)
    folders = {task: tmp_path / task for task in TASKS}
    with pytest.raises(AdapterError, match=r"expert 'a' \(.*a\) has no head"):
        MergeModule("not/there", folders, objective=Entropy(heads()))
    wide = heads() | {"b": TextClassification(4, WIDTH)}
    with pytest.raises(AdapterError, match="the head of 'b' has"):
        MergeModule("not/there", experts(tiny_bert()), objective=Entropy(wide))


def test_yaml_with_a_regression_task_ends_with_one_line(capsys):
    objective = "{class_path: nscmerge.objectives.Entropy, init_args: {tasks: {bbc: {class_path: "
    objective += "tasks.regression.TextRegression}, crowdflower: {class_path: tasks.regression.TextRegression}}}}"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/experiments/text6_adamerging.yaml", "--model.init_args.objective", objective])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "undefined for regression: the tasks ['bbc', 'crowdflower']" in err
    assert len(err.strip().splitlines()) == 1
