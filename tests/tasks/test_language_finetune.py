"""Fine-tuning of every kind of language task on the tiny models: the loss falls, and the expert is what was scored."""

import json

import pytest
import torch
from lightning import Trainer
from peft import PeftModel
from torch.utils.data import DataLoader

from datamodules.base import collate
from datamodules.clip import CLIPDataModule
from datamodules.glue import GLUEDataModule
from datamodules.nli import NLIDataModule
from datamodules.twins import clip, glue, models, nli, vlm
from datamodules.vlm import VLMDataModule
from nscmerge.adapters import load_adapter
from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError, TargetError
from nscmerge.pretrained import Pretrained
from tasks.expert import read_expert
from tasks.finetune import FineTune
from tasks.lora import lora_layers, train_whole
from tasks.sequence_classification import SequenceClassification
from tasks.text_to_text import TextToText
from tasks.vqa import VizWizVQA
from tasks.zero_shot import ZeroShotClassification

PROJECTOR = ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
CLASSES = {
    "nli": "AutoModel",
    "vlm": "AutoModelForImageTextToText",
    "glue": "AutoModelForSeq2SeqLM",
    "clip": "CLIPVisionModelWithProjection",
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Base models and data, by suite."""
    root = tmp_path_factory.mktemp("twins")
    bases = {
        "nli": models.write_llama(root / "llama"),
        "vlm": models.write_llava(root / "llava"),
        "glue": models.write_t5(root / "t5"),
        "clip": models.write_clip(root / "clip"),
    }
    nli.write_nli(root / "nli", rows=12, train_rows=32)
    glue.write_glue(root / "glue", rows=12, train_rows=32)
    vlm.write_vlm(root / "vlm", rows=20)
    clip.write_clip(root / "clips", rows=12, tasks=["eurosat"])
    return root, {suite: str(folder) for suite, folder in bases.items()}


def made(twins, suite, **options):
    """Return a fine-tuning and the data of one task of a suite."""
    root, bases = twins
    base = bases[suite]
    task, data = {
        "nli": lambda: (
            SequenceClassification(3, 32, mask_class=1),
            NLIDataModule("rte", base, source=str(root / "nli" / "rte"), batch_size=4, eval_batch_size=16),
        ),
        "vlm": lambda: (
            VizWizVQA(base, max_new_tokens=6),
            VLMDataModule("vizwiz", base, source=str(root / "vlm" / "vizwiz"), batch_size=4, eval_batch_size=16),
        ),
        "glue": lambda: (
            TextToText(base),
            GLUEDataModule("sst2", base, source=str(root / "glue" / "sst2"), batch_size=4, eval_batch_size=16),
        ),
        "clip": lambda: (
            ZeroShotClassification("eurosat"),
            CLIPDataModule("eurosat", base, source=str(root / "clips" / "eurosat"), batch_size=4, eval_batch_size=16),
        ),
    }[suite]()
    torch.manual_seed(0)
    defaults = {
        "rank": 8,
        "alpha": 16,
        "dropout": 0.0,
        "lr": 1e-2,
        "warmup": 0.06,
        "schedule": "cosine",
        "target_modules": ["q", "v"] if suite == "glue" else ["q_proj", "v_proj"],
    }
    if suite == "vlm":
        defaults |= {"modules_to_save": PROJECTOR, "exclude_modules": ["vision_tower", "multi_modal_projector"]}
    return FineTune(task, Pretrained(base, CLASSES[suite]), **{**defaults, **options}), data


def trainer(folder, **options):
    options = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


def loss_on(fine, data, split="val"):
    """Return the mean loss of one split, in eval mode."""
    fine.eval()
    losses = []
    with torch.no_grad():
        for batch in DataLoader(data.supervised(split), batch_size=16, collate_fn=collate):
            target = batch.pop("target")
            losses.append(float(fine.task.loss(fine(batch), target)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("suite", CLASSES)
def test_training_lowers_the_loss_and_the_folder_predicts_what_was_scored(twins, suite, tmp_path):
    fine, data = made(twins, suite, output=tmp_path / "expert", name=suite)
    data.setup("fit")
    fine.configure_model()
    before = {name: tensor.clone() for name, tensor in fine.model.state_dict().items() if "lora_" not in name}
    start = loss_on(fine, data)
    trainer(tmp_path).fit(fine, datamodule=data)
    assert loss_on(fine, data) < 0.7 * start

    # Nothing but LoRA, head and the projector's weights has changed.
    changed = {n for n, t in fine.model.state_dict().items() if n in before and not torch.equal(t, before[n])}
    wanted = {f"model.{name}.weight" for name in PROJECTOR} if suite == "vlm" else set()
    assert changed == wanted
    assert all("vision_tower" not in name for name in lora_layers(fine.model))

    adapter, head = read_expert(tmp_path / "expert", suite)
    assert bool(head) == (suite == "nli")
    assert set(adapter.saved) == {f"model.{n}.{kind}" for n in (PROJECTOR if suite == "vlm" else ()) for kind in KINDS}
    card = json.loads((tmp_path / "expert" / "expert.json").read_text())
    assert card["training"]["schedule"] == "cosine"
    assert card["notes"] == fine.task.notes()
    assert any("greedy" in note for note in card["notes"]) == (suite in ("vlm", "glue"))
    # The reader is PEFT itself, on a new base.
    new, _ = made(twins, suite)
    new.task.load_head(head, suite)
    base = load_base_model(new.base_model)
    model = PeftModel.from_pretrained(base, tmp_path / "expert").base_model.model
    metrics, predict = new.task.metrics(), new.task.evaluator()
    data.setup("test")
    with torch.no_grad():
        for batch in data.test_dataloader():
            target = batch.pop("target")
            torch.testing.assert_close(new.task(model, batch), fine.eval()(batch), atol=1e-3, rtol=1e-3)
            metrics.update(predict(model, batch), target)
    scored = {name: float(value) for name, value in metrics.compute().items()}
    assert card["scores"]["test"] == pytest.approx(scored, abs=1e-5)


KINDS = ("weight", "bias")


def test_the_projectors_deltas_are_exact_and_its_biases_stay(twins, tmp_path):
    fine, data = made(twins, "vlm", output=tmp_path / "expert")
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(fine, datamodule=data)
    base = load_base_model(fine.base_model).state_dict()
    dense = load_adapter(tmp_path / "expert").on_base(base).dense
    assert len(dense) == 4
    for name, delta in dense.items():
        assert bool(delta.any()) == name.endswith("weight")
        assert torch.equal(delta, fine.model.state_dict()[name] - base[name])  # fp32, not rounded as LoRA is
    trained, data = made(twins, "vlm", train_bias=True)
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(trained, datamodule=data)
    name = f"model.{PROJECTOR[0]}.bias"
    assert not torch.equal(trained.model.state_dict()[name], base[name])


def test_the_best_epoch_is_kept_and_survives_a_checkpoint(twins, tmp_path):
    fine, data = made(twins, "nli", keep="best", lr=3.0, output=tmp_path / "expert", half=False, schedule="linear")
    seen = []
    offer = fine.best.offer

    def watched(loss, epoch, tensors):
        seen.append((loss, epoch))
        offer(loss, epoch, tensors)

    fine.best.offer = watched
    run = trainer(tmp_path, max_epochs=4)
    run.fit(fine, datamodule=data)
    best = min(seen)
    assert len(seen) == 4
    assert best[1] < 3  # lr 3 makes a mess of it, so the last epoch is not the best
    assert loss_on(fine, data) == pytest.approx(best[0], rel=1e-4)
    card = json.loads((tmp_path / "expert" / "expert.json").read_text())
    assert card["training"]["best_epoch"] == best[1]
    run.save_checkpoint(tmp_path / "end.ckpt")
    other, data = made(twins, "nli", keep="best")
    trainer(tmp_path).test(other, datamodule=data, ckpt_path=tmp_path / "end.ckpt", weights_only=False, verbose=False)
    assert (other.best.loss, other.best.epoch) == best
    assert all(torch.equal(t, fine.best.tensors[name]) for name, t in other.best.tensors.items())


def test_a_bf16_base_trains_in_fp32_under_autocast(twins, tmp_path):
    fine, data = made(twins, "vlm")
    fine.base_model = Pretrained(fine.base_model.source, CLASSES["vlm"], dtype="bfloat16")
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1, precision="bf16-mixed")
    run.fit(fine, datamodule=data)
    trained = [p for p in fine.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert len(trained) == 2 * len(lora_layers(fine.model)) + 2
    frozen = {p.dtype for p in fine.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    other, data = made(twins, "vlm")
    other.base_model = fine.base_model
    with pytest.raises(ConfigError, match=r"multi_modal_projector.linear_1.*trained in fp32.*bf16-mixed"):
        trainer(tmp_path, max_epochs=1).fit(other, datamodule=data)


def test_the_ratios_before_training_take_no_more_batches_than_a_validation(twins, tmp_path):
    fine, data = made(twins, "vlm")
    data.eval_batch_size = 1
    seen = []
    step = fine.task.features
    fine.task.features = lambda model, inputs: (seen.append(model.training), step(model, inputs))[1]
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=2).fit(fine, datamodule=data)
    assert len(seen) == 2 + 1 + 2  # before, training, after


@pytest.mark.parametrize(("length", "steps"), [("training", 4), ("loader", 16)])
def test_the_schedule_ends_with_the_training_or_with_the_loader(twins, tmp_path, length, steps):
    fine, data = made(twins, "nli", schedule_length=length, warmup=0.0, keep="last")
    rates = []
    step = fine.training_step

    def watched(batch, batch_idx):
        rates.append(fine.trainer.optimizers[0].param_groups[-1]["lr"])
        return step(batch, batch_idx)

    fine.training_step = watched
    # 32 samples in batches of 4 are 8 steps an epoch, of which 2 are taken.
    trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=1).fit(fine, datamodule=data)
    expected = [0.01 * (1 + torch.tensor(max(0, s - 1) / (steps - 1) * torch.pi).cos().item()) / 2 for s in range(4)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_trained_is_refused(twins, tmp_path):
    with pytest.raises(TargetError, match=r"\['k_proj'\] name no linear layer .* outside of language_model, vision"):
        made(twins, "vlm", target_modules=["k_proj"], exclude_modules=["language_model", "vision_tower"])[
            0
        ].configure_model()
    with pytest.raises(TargetError, match="modules_to_save names 'projector', and LlamaModel has no such module"):
        made(twins, "nli", modules_to_save=["projector"])[0].configure_model()
    with pytest.raises(TargetError, match=r"modules_to_save names '.*v_proj', Linear, which carries LoRA"):
        made(twins, "nli", modules_to_save=["v_proj"])[0].configure_model()
    with pytest.raises(TargetError, match=r"'layers.0.mlp', LlamaMLP, which has no weight of its own"):
        train_whole(load_base_model(twins[1]["nli"]), ["layers.0.mlp"])
    fine, data = made(twins, "nli", keep="best")
    with pytest.raises(ConfigError, match="keep is 'best' and there is no validation"):
        trainer(tmp_path, limit_val_batches=0).fit(fine, datamodule=data)
    fine, data = made(twins, "clip", rank=0)
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer(tmp_path).fit(fine, datamodule=data)
