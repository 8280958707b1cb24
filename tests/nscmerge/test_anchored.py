"""Anchored NSC against single experts with dense weights; its means over steps, interruption, and how it ends a fit."""

import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from nscmerge import MergeModule
from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC, AnchoredNSC
from nscmerge.objectives.anchors import Anchors, sample_keys
from tests.fakes.fit_merge import TASKS, adapters, data, module
from tests.fakes.text_tasks import tiny_bert
from tests.oracles import dense_ratio

ROOT = Path(__file__).parents[2]


def batch(seed=1, sizes=(2, 3, 1), lengths=(5, 9, 7)):
    """Right-padded inputs of three tasks, one sample of each shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k, (task, n, length) in enumerate(zip(TASKS, sizes, lengths, strict=True)):
        mask = torch.ones(n, length, dtype=torch.long)
        mask[0, length - k :] = 0
        ids = torch.randint(1, 50, (n, length), generator=generator)
        made[task] = {"input_ids": ids * mask, "attention_mask": mask}
    return made


def set_up(model=None, lam=0.4, layers_of=lambda experts: experts, **options):
    model = tiny_bert() if model is None else model
    experts = layers_of({task: adapter.layers for task, adapter in adapters(model).items()})
    objective = AnchoredNSC(**{"blocks": 1} | options)
    coefficients = Coefficients(sorted({n for e in experts.values() for n in e}), list(experts), init=lam)
    objective.prepare(model, experts)
    return attach(model, experts, coefficients), objective, coefficients, experts


def dense_omegas(weights, inputs, adapter, targets):
    """Oracle: one sample at a time, unpadded, dense weights in fp64, explicit projectors."""
    model = tiny_bert().double()
    for name, delta in weights.items():
        model.get_submodule(name).weight.data += delta
    omegas = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        seen = {}
        hooks = [
            model.get_submodule(t).register_forward_pre_hook(lambda m, a, t=t, s=seen: s.__setitem__(t, a[0]))
            for t in targets
        ]
        model(input_ids=ids[mask][None], attention_mask=mask[mask][None].long())
        for hook in hooks:
            hook.remove()
        omegas.append(torch.stack([dense_ratio(z, adapter[t].A).mean() for t, z in seen.items()]).mean())
    return torch.stack(omegas)


def oracle_gaps(experts, lam, inputs, targets):
    """Every task's mean gap, from separate passes of single experts and of the dense merge."""
    merged = {n: sum(lam * e[n].dense().double() for e in experts.values()) for n in experts["a"]}
    gaps = {}
    for task, adapter in experts.items():
        own = {n: e.dense().double() for n, e in adapter.items()}
        with_merge = dense_omegas(merged, inputs[task], adapter, targets)
        gaps[task] = float((with_merge - dense_omegas(own, inputs[task], adapter, targets)).mean())
    return gaps


PENALTIES = {"hinge": lambda g: max(0.0, g), "absolute": abs, "squared": lambda g: g**2}


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_losses_equal_dense_single_experts(penalty, buckets):
    merged, objective, _, experts = set_up(penalty=penalty, buckets=buckets)
    (group,) = fuse(inputs := batch())
    gaps = oracle_gaps(experts, 0.4, inputs, objective.targets)
    assert min(gaps.values()) < -1e-4 < 1e-4 < max(gaps.values())  # both sides occur
    for task, loss in objective.losses(merged, group).items():
        assert loss.item() == pytest.approx(PENALTIES[penalty](gaps[task]), abs=2e-6)
        assert objective.mean_gap(task) == pytest.approx(gaps[task], abs=2e-6)
    for task, gap in objective.report(merged, group).items():
        assert gap.item() == pytest.approx(gaps[task], abs=2e-6)


@pytest.mark.parametrize(("penalty", "slope"), [("hinge", (0, 1)), ("absolute", (-1, 1)), ("squared", None)])
def test_gradient_is_the_slope_times_that_of_the_plain_ratio(penalty, slope):
    merged, objective, coefficients, experts = set_up(penalty=penalty)
    plain = NSC(blocks=1)
    plain.prepare(tiny_bert(), experts)
    parameters = [
        p for p, n in zip(coefficients.lam, coefficients.layers, strict=True) if ".1.attention.output" not in n
    ]
    (group,) = fuse(batch())
    for task, loss in objective.losses(merged, group).items():
        got = torch.cat(torch.autograd.grad(loss, parameters, retain_graph=True))
        omega = plain.losses(merged, group)[task]
        gap = objective.mean_gap(task)
        want = 2 * gap if slope is None else slope[gap > 0]
        torch.testing.assert_close(got, want * torch.cat(torch.autograd.grad(omega, parameters)), rtol=1e-4, atol=1e-8)
        if penalty == "hinge" and gap < 0:
            assert not got.any()


def test_memory_takes_the_slope_from_the_mean_over_steps():
    batches = [batch(seed) for seed in range(4)]
    for memory in (0.0, 0.5, 1.0):
        merged, objective, _, _ = set_up(penalty="squared", memory=memory)
        alone = []
        for inputs in batches:
            _, fresh, _, _ = set_up(penalty="squared")
            fresh.losses(merged, fuse(inputs)[0])
            alone.append(fresh.mean_gap("b"))
            value = objective.losses(merged, fuse(inputs)[0])["b"].item()
            weights = [memory**i for i in reversed(range(len(alone)))]
            mean = sum(w * g for w, g in zip(weights, alone, strict=True)) / sum(weights)
            assert objective.mean_gap("b") == pytest.approx(mean, abs=1e-7)
            assert value == pytest.approx(mean**2, rel=1e-4)


def test_experts_run_once_per_sample_and_padding_does_not_make_another_sample():
    merged, objective, _, _ = set_up()
    runs = []
    alone = merged.alone
    merged.alone = lambda task: runs.append(task) or alone(task)
    inputs = batch()
    first = objective.losses(merged, fuse(inputs)[0])
    assert runs == [0, 1, 2]
    wide = {t: {n: torch.nn.functional.pad(v, (0, 4)) for n, v in x.items()} for t, x in inputs.items()}
    again = objective.losses(merged, fuse(wide)[0])
    assert runs == [0, 1, 2]
    assert len(objective.anchors) == 6
    objective.anchors = Anchors()
    recomputed = objective.losses(merged, fuse(inputs)[0])
    for task in TASKS:
        assert again[task].item() == pytest.approx(first[task].item(), abs=2e-7)
        assert recomputed[task].item() == pytest.approx(first[task].item(), abs=2e-7)


def test_keys_tell_samples_tasks_and_purposes_apart():
    (group,) = fuse({"a": {"x": torch.tensor([[1, 2], [1, 2], [2, 1]])}, "b": {"x": torch.tensor([[1, 2]])}})
    keys = sample_keys(group, "r")
    first, twin, other = keys["a"]
    assert first == twin
    assert len({first, other, *keys["b"], *sample_keys(group, "s")["a"][:1]}) == 4


def test_memory_of_ratios_is_bounded_oldest_first():
    anchors = Anchors(most=3)
    anchors.update({1: 0.1, 2: 0.2})
    anchors.update({3: 0.3, 4: 0.4})
    assert [key in anchors for key in (1, 2, 3, 4)] == [False, True, True, True]
    fresh = Anchors()
    fresh.load(anchors.state())
    assert fresh[4] == 0.4
    assert len(fresh) == 3


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_task_at_coefficient_one_is_its_own_anchor(penalty):
    merged, objective, _, _ = set_up(lam=1.0, penalty=penalty, layers_of=lambda e: {"b": e["b"]})
    (group,) = fuse({"b": batch()["b"]})
    assert objective.losses(merged, group)["b"].item() == pytest.approx(0, abs=1e-7)


def test_running_an_expert_alone_leaves_the_merge_as_it_was():
    merged, _, coefficients, experts = set_up()
    inputs = batch()["b"]
    before = merged.model(**inputs).last_hidden_state
    expert = tiny_bert()
    for name, layer in experts["b"].items():
        expert.get_submodule(name).weight.data += layer.dense()
    with merged.alone(1):
        got = merged.model(**inputs).last_hidden_state
    torch.testing.assert_close(got, expert(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.model(**inputs).last_hidden_state, before)
    assert (coefficients.matrix() == 0.4).all()
    with pytest.raises(RuntimeError, match="halfway"), merged.alone(1):
        raise RuntimeError("halfway")
    assert torch.equal(merged.model(**inputs).last_hidden_state, before)


def trainer(folder, steps, **options):
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        **options,
    )  # fmt: skip


def test_an_objective_at_rest_leaves_coefficients_alone_and_says_nothing_about_reach(tmp_path):
    model = tiny_bert()
    own = adapters(model)["b"]
    loader = DataLoader([{"b": batch()["b"]}] * 3, batch_size=None)
    merge = MergeModule(model, {"b": own}, init=0.5, objective=AnchoredNSC(blocks=1, penalty="squared"))
    rest = merge.objective.losses
    merge.objective.losses = lambda *args: {task: 0.0 * loss for task, loss in rest(*args).items()}
    trainer(tmp_path, 3).fit(merge, loader)
    assert (merge.coefficients.matrix() == 0.5).all()  # not even decayed
    assert merge.unreached is None
    merge.objective.losses = rest
    trainer(tmp_path, 1).fit(merge, loader)
    assert merge.unreached == ["encoder.layer.1.attention.output.dense"]


def test_stops_when_every_task_is_at_its_expert(tmp_path, capsys):
    objective = AnchoredNSC(blocks=1, penalty="squared", memory=0.8, stop=0.02)
    merge = module(objective=objective)
    fit = trainer(tmp_path, 200)
    fit.fit(merge, data())
    assert 5 <= fit.global_step < 200
    gaps = merge.update().recipe.options["objective"]["mean_gap"]
    assert list(gaps) == list(TASKS)
    assert max(map(abs, gaps.values())) <= 0.02
    never = trainer(tmp_path, 12)
    never.fit(module(objective=AnchoredNSC(blocks=1, penalty="squared", memory=0.8, stop=0.0)), data())
    assert never.global_step == 12


def test_a_task_that_no_coefficient_moves_does_not_hold_up_the_end():
    def cut(experts):
        first = {n: e for n, e in experts["a"].items() if n == "encoder.layer.0.attention.self.query"}
        return {"a": first, "b": {n: e for n, e in experts["b"].items() if ".1." in n}}

    options = {"blocks": 2, "projections": ["query", "attention.output.dense"], "penalty": "absolute"}
    merged, objective, _, _ = set_up(layers_of=cut, memory=0.5, stop=1.0, **options)
    (group,) = fuse({task: inputs for task, inputs in batch().items() if task != "c"})
    objective.losses(merged, group)
    assert objective.finished() is None  # one step is no mean
    objective.losses(merged, group)
    assert objective.options()["movable"] == ["b"]
    assert objective.finished() == "b are at their experts' ratio within 1.0; no coefficient moves the ratio of a"


def run(*args):
    command = [sys.executable, "-m", "tests.fakes.fit_merge", "--objective", "anchored", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder / "out.pt", folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


def test_killed_and_resumed_gives_the_same_coefficients_bit_for_bit(uninterrupted, tmp_path):
    assert run(tmp_path / "out.pt", tmp_path, "--kill-after", 5).returncode == -signal.SIGKILL
    resumed = run(tmp_path / "out.pt", tmp_path, "--resume", tmp_path / "checkpoints" / "step=3.ckpt")
    assert resumed.returncode == 0, resumed.stderr
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(got["lam"], uninterrupted["lam"])
    assert got["ratios"] == uninterrupted["ratios"]
    assert (got["lam"] - 0.4).abs().max() > 0.01


@pytest.mark.slow  # the fast suite has the same of plain NSC
def test_two_processes_give_the_coefficients_of_one(uninterrupted, tmp_path):
    assert run(tmp_path / "out.pt", tmp_path, "--devices", 2).returncode == 0
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(got["lam"], uninterrupted["lam"], rtol=0, atol=1e-5)


def test_checkpoints_hold_coefficients_and_the_objective_s_own_state(tmp_path):
    fit = trainer(tmp_path, 2)
    fit.fit(merge := module(objective=AnchoredNSC(blocks=1, memory=0.9)), data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[0] for key in state} == {"coefficients.lam", "objective"}
    assert len(state["objective._extra_state"]["anchors"]["keys"]) == len(merge.objective.anchors) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 1.5}, r"memory is 1.5; it is a weight in \[0, 1\]"),
        ({"stop": -1.0, "memory": 0.9}, r"stop is -1.0; it is the largest mean gap"),
        ({"stop": 0.1}, r"stop needs the mean over the last batches, and memory is 0.0; set it between"),
        ({"stop": 0.1, "memory": 1}, r"stop needs the mean over the last batches, and memory is 1"),
        ({"buckets": 0}, r"buckets is 0; a step takes one pass at least"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AnchoredNSC(**options)


def test_buckets_and_pooled_tokens_exclude_each_other():
    with pytest.raises(ConfigError, match="buckets needs reduction 'sample'"):
        NSC(reduction="flat", buckets=2)
