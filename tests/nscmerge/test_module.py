"""Learning a merge through the Trainer: numbers, interruption, several processes, and what is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from nscmerge import Adapter, LowRank, MergeModule, NSCMergeError, load_adapter
from nscmerge.errors import ConfigError, OutputExistsError, ShapeError, TargetError
from nscmerge.objectives import NSC
from tests.fakes.fit_merge import TASKS, adapters, data, module
from tests.fakes.text_tasks import tiny_bert
from tests.oracles import TOY_LAYERS, toy

ROOT = Path(__file__).parents[2]


def trainer(folder, steps=3, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = (
        quiet | {"enable_model_summary": False, "val_check_interval": 2, "check_val_every_n_epoch": None} | options
    )
    return lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, **options)


@pytest.mark.parametrize("accumulate", ["fused", "task"])
@pytest.mark.parametrize("group", ["uniform", "scaled", "mixed"])
def test_fit_gives_the_reference_coefficients(group, accumulate, tmp_path):
    model, experts, batch, golden = toy(group, "all")
    merge = MergeModule(
        model,
        {task: Adapter(layers=layers, name=task) for task, layers in experts.items()},
        objective=NSC(blocks=2, projections=["q_proj", "up_proj"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        accumulate=accumulate,
    )
    trainer(tmp_path, 5).fit(merge, DataLoader([batch] * 5, batch_size=None))
    for row, layer in enumerate(sorted(TOY_LAYERS)):
        want = golden[f"lambda_after5.{layer}"].float()
        torch.testing.assert_close(merge.coefficients.matrix()[row], want, rtol=1e-4, atol=0)
    assert merge.unreached == ["layers.1.mlp.up_proj"]
    # What no target reaches is not even decayed.
    assert torch.equal(merge.coefficients.matrix()[1], torch.full((3,), 0.4))


def test_per_task_accumulation_has_the_fused_gradient(tmp_path):
    fits = {way: module(accumulate=way) for way in ("fused", "task")}
    for merge in fits.values():
        trainer(tmp_path, 4).fit(merge, data())
    torch.testing.assert_close(
        fits["fused"].coefficients.matrix(), fits["task"].coefficients.matrix(), rtol=1e-6, atol=1e-6
    )


def test_the_folder_holds_the_function_that_was_learned(tmp_path):
    peft = pytest.importorskip("peft")
    merge = module(output=tmp_path / "merge")
    trainer(tmp_path).fit(merge, data())
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "merge").eval()
    batch = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with torch.no_grad():
        got = loaded(**batch).last_hidden_state
        want = merge.merged.model(**batch).last_hidden_state
        base = tiny_bert()(**batch).last_hidden_state
    assert (got - want).abs().max() <= 1e-5
    assert (got - base).abs().max() > 1e-2
    receipt = json.loads((tmp_path / "merge" / "receipt.json").read_text())
    assert receipt["method"] == "nsc"
    assert set(receipt["coefficients"]) == set(TASKS)
    assert receipt["options"]["steps"] == 3
    assert receipt["options"]["data"] == {"batch_size": 4, "split": "val", "seed": 5}
    assert receipt["extra"]["unreached"] == ["encoder.layer.1.attention.output.dense"]


def test_one_adapter_at_coefficient_one_is_itself(tmp_path):
    model = tiny_bert()
    expert = adapters(model)["b"]
    merge = MergeModule(model, {"b": expert}, init=1.0)
    folded = merge.update()
    for layer, factors in expert.layers.items():
        torch.testing.assert_close(folded.delta(layer), factors.dense(), rtol=1e-6, atol=1e-7)


def stream():
    joint = data()
    joint.setup("fit")
    return joint.train_dataloader()


def run(*args):
    command = [sys.executable, "-m", "tests.fakes.fit_merge", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder / "out.pt", folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


def test_killed_and_resumed_gives_the_same_coefficients_bit_for_bit(uninterrupted, tmp_path):
    killed = run(tmp_path / "out.pt", tmp_path, "--kill-after", 5)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.pt").exists()
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    resumed = run(tmp_path / "out.pt", tmp_path, "--resume", checkpoint)
    assert resumed.returncode == 0, resumed.stderr
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(got["lam"], uninterrupted["lam"])
    assert got["ratios"] == uninterrupted["ratios"]
    assert (got["lam"] - 0.4).abs().max() > 0.01


def test_two_processes_give_the_coefficients_of_one(uninterrupted, tmp_path):
    done = run(tmp_path / "out.pt", tmp_path, "--devices", 2)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(got["lam"], uninterrupted["lam"], rtol=0, atol=1e-6)
    assert got["ratios"] == pytest.approx(uninterrupted["ratios"], abs=1e-6)


def test_the_same_seed_gives_the_same_merge_and_another_seed_another(tmp_path):
    fits = []
    for seed in (5, 5, 6):
        merge, joint = module(), data()
        joint.seed = seed
        trainer(tmp_path).fit(merge, joint)
        fits.append(merge.coefficients.matrix())
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def test_checkpoints_hold_the_coefficients_alone(tmp_path):
    merge = module()
    run_ = trainer(tmp_path)
    run_.fit(merge, data())
    run_.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[0] for key in state} == {"coefficients.lam"}


def test_tensorboard_has_what_one_would_watch(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit = trainer(tmp_path, 10, logger=logger, log_every_n_steps=1, num_sanity_val_steps=-1)
    fit.fit(merge := module(), data())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    tags = events.Reload().Tags()
    scalars = set(tags["scalars"])
    assert {"loss", "lr", "step_seconds", "lam/moved_mean", "lam/moved_max", "val/omega"} <= scalars
    assert {
        f"{kind}/{t}" for t in TASKS for kind in ("omega", "val/omega", "lam_mean", "lam_min", "lam_max")
    } <= scalars
    assert "lam_a/encoder.layer.0.attention.self.query" in scalars
    assert {f"lam_histogram/{t}" for t in TASKS} == set(tags["histograms"])
    assert tags["images"] == ["lam/heat_map"]
    start, *_, end = events.Scalars("val/omega/a")
    assert start.step == 0
    assert start.value == pytest.approx(merge.first_ratios["a"])
    assert end.value == pytest.approx(merge.validation_ratios["a"])
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 10
    omegas = [events.Scalars(f"omega/{t}")[4].value for t in TASKS]
    assert losses[4] == pytest.approx(sum(omegas) / 3, abs=1e-6)


def test_warns_when_a_coefficient_leaves_the_unit_interval(tmp_path):
    merge = module(init=0.999, optimizer=lambda p: torch.optim.SGD(p, lr=100.0))
    with pytest.warns(UserWarning, match=r"the coefficient of '[abc]' at layer '.*' has left \[0, 1\]"):
        trainer(tmp_path).fit(merge, data())


def test_bounds_keep_coefficients_inside(tmp_path):
    merge = module(bounds=(0.0, 1.0), optimizer=lambda p: torch.optim.SGD(p, lr=100.0))
    trainer(tmp_path).fit(merge, data())
    matrix = merge.coefficients.matrix()
    assert matrix.min() >= 0
    assert matrix.max() <= 1


def test_a_merge_can_start_at_the_weight_average():
    assert module(init="weight_average").coefficients.init == pytest.approx(1 / 3)


def test_task_wise_coefficients_are_shared_by_the_layers(tmp_path):
    merge = module(granularity="task")
    trainer(tmp_path).fit(merge, data())
    matrix = merge.coefficients.matrix()
    assert (matrix == matrix[0]).all()
    assert not (matrix[0] == 0.4).any()


def test_bad_input_is_refused_before_any_work(tmp_path):
    model = tiny_bert()
    experts = adapters(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out is there already"):
        MergeModule(model, experts, output=tmp_path / "out")
    layer = sorted(experts["a"].layers)[0]
    wide = Adapter({**experts["b"].layers, layer: LowRank(torch.ones(2, 48), torch.ones(32, 2))}, "tiny", name="b")
    with pytest.raises(ShapeError, match=rf"layer '{layer}'.*'a' is \(32, 32\), \(32, 48\) of 'b'"):
        MergeModule(model, {"a": experts["a"], "b": wide})
    with pytest.raises(NSCMergeError, match="'nowhere/at-all' is neither a folder"):
        MergeModule(model, {"a": "nowhere/at-all"})
    with pytest.raises(ConfigError, match=r"bounds \(0.5, 1.0\) do not hold the start value 0.4"):
        MergeModule(model, experts, bounds=(0.5, 1.0))


def test_an_endless_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.max_steps is -1"):
        trainer(tmp_path, -1, max_epochs=1).fit(module(), data())


def test_too_few_samples_are_named(tmp_path):
    with pytest.raises(ConfigError, match="task 'a' has 10 samples in its 'val' split, 12 are needed"):
        trainer(tmp_path).fit(module(), data(batch_size=12))


def test_an_empty_target_selection_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"no target layer is left: blocks \[7\]"):
        trainer(tmp_path).fit(module(objective=NSC(blocks=[7])), data())


def test_a_failed_fit_leaves_no_merge_folder(tmp_path):
    merge = module(output=tmp_path / "merge", objective=NSC(blocks=[7]))
    with pytest.raises(TargetError):
        trainer(tmp_path).fit(merge, data())
    assert not (tmp_path / "merge").exists()


def test_a_task_without_expert_is_named(tmp_path):
    model = tiny_bert()
    experts = adapters(model)
    del experts["c"]
    with pytest.raises(ConfigError, match=r"only experts: \[\], only data: \['c'\]"):
        trainer(tmp_path).fit(MergeModule(model, experts, objective=NSC(blocks=1)), data())
    loader = DataLoader([next(iter(stream()))], batch_size=None)
    with pytest.raises(ConfigError, match=r"the data have tasks \['c'\] without an expert"):
        trainer(tmp_path).fit(MergeModule(tiny_bert(), experts, objective=NSC(blocks=1)), loader)


def test_finite_loaders_end_by_epochs(tmp_path):
    loader = DataLoader([next(iter(stream())) for _ in range(3)], batch_size=None)
    fit = trainer(tmp_path, -1, max_epochs=2)
    fit.fit(module(), loader)
    assert fit.global_step == 6


def test_bf16_trainer_keeps_coefficients_in_fp32(tmp_path):
    merge = module()
    trainer(tmp_path, precision="bf16-true").fit(merge, data())
    assert {p.dtype for p in merge.coefficients.parameters()} == {torch.float32}
    assert next(merge.base.parameters()).dtype == torch.bfloat16


def test_a_merge_of_merges_is_an_adapter(tmp_path):
    merge = module(output=tmp_path / "merge")
    trainer(tmp_path).fit(merge, data())
    again = load_adapter(tmp_path / "merge")
    for layer, factors in again.layers.items():
        torch.testing.assert_close(factors.dense(), merge.update().delta(layer), rtol=1e-5, atol=1e-6)
