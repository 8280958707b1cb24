"""Large bases: in two processes, sharded or whole, and split over devices, a merge learns what one process learns."""

import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from nscmerge import MergeModule
from nscmerge.checkpointing import checkpoint_blocks
from nscmerge.errors import ConfigError
from nscmerge.strategies import ShardedBase, SplitBase, check_strategy
from nscmerge.strategies.sharded import shard
from nscmerge.strategies.split import rows_to_split
from tests.fakes.fit_llama import OBJECTIVES, STEPS, adapters, data, llama

ROOT = Path(__file__).parents[2]


def alone(folder, objective="nsc", strategy="auto", model=None):
    """Learn in this process; return the module."""
    model = llama() if model is None else model
    merge = MergeModule(
        model, adapters(model), objective=OBJECTIVES[objective](), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    lightning.Trainer(
        accelerator="cpu", strategy=strategy, devices=1, max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, val_check_interval=STEPS,
        check_val_every_n_epoch=None,
    ).fit(merge, data())  # fmt: skip
    return merge


def apart(folder, *options):
    """Learn in two processes; return what each of them saved, and what was said."""
    command = [sys.executable, "-m", "tests.fakes.fit_llama", folder / "out.pt", folder, "--devices", 2, *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    saved = sorted(folder.glob("out.*.pt"))
    return [torch.load(path, weights_only=True) for path in saved], done.stderr


@pytest.mark.parametrize(
    ("strategy", "objective"),
    [("ddp", "nsc"), ("sharded", "nsc"), pytest.param("sharded", "full_sequence", marks=pytest.mark.slow)],
)
def test_two_processes_learn_what_one_does(strategy, objective, tmp_path):
    want = alone(tmp_path, objective)
    got, said = apart(tmp_path, "--strategy", strategy, "--objective", objective)
    assert len(got) == 2, said
    for process in got:
        torch.testing.assert_close(process["lam"], want.coefficients.matrix(), rtol=0, atol=1e-5)
        assert process["ratios"] == pytest.approx(want.validation_ratios, abs=1e-5)
    assert (got[0]["lam"] - 0.4).abs().max() > 0.01
    whole = sum(p.numel() for p in want.base.parameters())
    shares = [process["held"] for process in got]
    # Samples are split in both; only the sharded base is.
    assert shares == [whole, whole] if strategy == "ddp" else max(shares) < 0.51 * whole
    if strategy == "sharded":
        assert whole <= sum(shares) < 1.01 * whole  # padding of what does not divide


@pytest.mark.slow
def test_sharded_blocks_can_be_recomputed_too(tmp_path):
    want = alone(tmp_path)
    got, said = apart(tmp_path, "--strategy", "sharded", "--checkpointing")
    assert len(got) == 2, said
    torch.testing.assert_close(got[0]["lam"], want.coefficients.matrix(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--val-samples", 5), "Set data.init_args.val_samples to a multiple of 2"),
        (("--objective", "anchored"), "AnchoredNSC with these options runs as many passes as its samples ask for"),
    ],
)
def test_processes_that_would_wait_for_each_other_stop_at_once(options, match, tmp_path):
    got, said = apart(tmp_path, "--strategy", "sharded", *options)
    assert not got
    assert match in said


def test_one_process_and_several_devices_learn_the_same(tmp_path):
    want = alone(tmp_path)
    for strategy in (SplitBase(["cpu"] * 3), ShardedBase()):
        got = alone(tmp_path, strategy=strategy)
        torch.testing.assert_close(got.coefficients.matrix(), want.coefficients.matrix(), rtol=0, atol=1e-6)
        assert got.validation_ratios == pytest.approx(want.validation_ratios, abs=1e-6)
    torch.distributed.destroy_process_group()
    assert got.merged.truncated is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize("objective", ["nsc", "full_sequence"])
def test_a_base_split_over_cpu_and_gpu_learns_the_same(objective, tmp_path):
    want = alone(tmp_path, objective)
    got = alone(tmp_path, objective, SplitBase(["cpu", "cuda:0"]))
    torch.testing.assert_close(got.coefficients.matrix(), want.coefficients.matrix(), rtol=0, atol=1e-4)


class Traveller(nn.Module):
    """A block that notes where its inputs are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen = []

    def forward(self, x, position=None, cache=None):
        self.seen.append((x.device.type, position[0].device.type, cache))
        return self.linear(x)


def test_blocks_are_dealt_out_in_order_and_inputs_follow():
    """On the meta device, which computes nothing but is a device of its own."""
    blocks = nn.ModuleList(Traveller() for _ in range(4))
    model = nn.Module()
    model.layers = blocks
    strategy = SplitBase(["cpu", "meta"])
    strategy.connect(merge := lightning.LightningModule())
    merge.model = model
    strategy.model_to_device()
    assert [b.linear.weight.device.type for b in blocks] == ["cpu", "cpu", "meta", "meta"]
    x = torch.ones(2, 4)
    cache = object()
    for block in blocks[:3]:
        x = block(x, position=(torch.ones(2), torch.ones(2)), cache=cache)
    assert x.device.type == "meta"
    assert [b.seen for b in blocks[:3]] == [[(d, d, cache)] for d in ("cpu", "cpu", "meta")]
    with pytest.raises(NotImplementedError, match="meta"):  # its result would go back to the first device
        blocks[3](x, position=(torch.ones(2), torch.ones(2)))
    model.to_empty(device="cpu")
    strategy.accelerator = CPUAccelerator()
    strategy.teardown()
    assert not any(b._forward_pre_hooks or b._forward_hooks for b in blocks)


def test_a_vision_tower_stays_whole():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    (row,) = rows_to_split(llava)
    assert row == list(llava.model.language_model.layers)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found no GPU"):
        SplitBase([])
    with pytest.raises(ConfigError, match="no repeated blocks to split"):
        rows_to_split(nn.Linear(2, 2))
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(ConfigError, match=r"would shard the coefficients.*nscmerge\.strategies\.ShardedBase"):
            check_strategy(strategy)
    for strategy in (DDPStrategy(), ShardedBase(), SingleDeviceStrategy("cpu"), SplitBase(["cpu"])):
        check_strategy(strategy)
    packed = llama()
    linear = packed.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.q_proj' is quantised \(torch.int8\)"):
        shard(packed, torch.device("cpu"), 1)
    strategy = ShardedBase()
    strategy.connect(lightning.LightningModule())
    with pytest.raises(ConfigError, match="shards the base of a merge that is being learned, and LightningModule"):
        strategy.model_to_device()


def test_recomputed_blocks_learn_the_same(tmp_path):
    want = alone(tmp_path)
    model = llama()
    undo = checkpoint_blocks(model)
    got = alone(tmp_path, model=model)
    undo()
    torch.testing.assert_close(got.coefficients.matrix(), want.coefficients.matrix(), rtol=0, atol=1e-7)
