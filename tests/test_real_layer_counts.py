"""LLaMA and LLaVA of 32 blocks and small width, on the twins' data: learned by NSC, tested with experts, end to end."""

import json

import lightning
import pytest
import torch
from torch import nn

from datamodules.joint import JointDataModule
from datamodules.nli import NLIDataModule
from datamodules.twins.models import write_llama, write_llava
from datamodules.twins.nli import write_nli
from datamodules.twins.vlm import write_vlm
from datamodules.vlm import VLMDataModule
from nscmerge import Adapter, MergeModule, Pretrained, save_adapter
from nscmerge.base_model import load_base_model
from nscmerge.factors import LowRank
from nscmerge.objectives import NSC
from tasks.benchmark import Benchmark
from tasks.sequence_classification import SequenceClassification
from tasks.vqa import ChartQA, DocVQA

pytestmark = pytest.mark.slow
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def write_experts(folder, base, tasks):
    """Write a random adapter on q and v of every language block per task, with the task's head if it has one."""
    model, found = load_base_model(base), {}
    names = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj")) and "vision" not in n]
    assert len(names) == 64
    for seed, (task, module) in enumerate(tasks.items()):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for n in names:
            linear = model.get_submodule(n)
            A = torch.randn(4, linear.in_features, generator=generator)
            layers[n] = LowRank(A, torch.randn(linear.out_features, 4, generator=generator) / 40)
        if isinstance(module, SequenceClassification):
            nn.init.normal_(module.linear.weight, generator=generator)
        found[task] = folder / task
        save_adapter(Adapter(layers, base.source, head=dict(module.state_dict()), name=task), found[task])
    return found


def nli(folder):
    base = Pretrained(str(write_llama(folder / "base", layers=32)))
    sources = write_nli(folder / "data", rows=12)
    data = {task: NLIDataModule(task, base.source, str(sources[task])) for task in ("rte", "snli")}
    masks = {"rte": 1, "snli": None}
    return (
        base,
        data,
        {task: SequenceClassification(3, 32, mask) for task, mask in masks.items()},
        {"position": "first_token"},
    )


def vlm(folder):
    base = Pretrained(str(write_llava(folder / "base", layers=32)), "AutoModelForImageTextToText")
    sources = write_vlm(folder / "data", rows=10)
    data = {task: VLMDataModule(task, base.source, str(sources[task])) for task in ("chartqa", "docvqa")}
    tasks = {"chartqa": ChartQA(base.source, max_new_tokens=4), "docvqa": DocVQA(base.source, max_new_tokens=4)}
    return base, data, tasks, {"position": "full_sequence", "max_new_tokens": 3}


@pytest.mark.parametrize("suite", [nli, vlm])
def test_goes_through_fit_and_test(suite, tmp_path):
    base, modules, tasks, options = suite(tmp_path)
    experts = write_experts(tmp_path, base, tasks)
    data = JointDataModule(modules, batch_size=2, val_samples=2, test_samples=4, test_batch_size=1)
    merge = MergeModule(base, experts, objective=NSC(**options), output=tmp_path / "merge")
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=tmp_path, val_check_interval=2, check_val_every_n_epoch=None,
        **QUIET,
    )  # fmt: skip
    trainer.fit(merge, data)
    assert len(merge.objective.targets) == 8  # the last quarter of 32
    assert merge.coefficients.matrix().shape == (64, 2)
    assert len(merge.unreached) == 2  # the last block's own q and v
    assert (merge.coefficients.matrix() - 0.4).abs().max() > 1e-4
    assert all(0 < value < 1 for value in merge.validation_ratios.values())

    benchmark = Benchmark(base, tasks, experts, {"nsc": tmp_path / "merge"}, output=tmp_path / "scores")
    lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET).test(benchmark, data, verbose=False)
    written = json.loads((tmp_path / "scores/scores.json").read_text())
    assert "nsc" in json.dumps(written)
    assert {task for task in tasks} <= set(json.dumps(written).replace('"', " ").split())
