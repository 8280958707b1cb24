import json

import pytest
import torch
from lightning import Trainer
from peft import PeftModel
from torch.utils.data import DataLoader

from datamodules.base import collate
from nscmerge.adapters import load_adapter
from nscmerge.errors import ConfigError, OutputExistsError, TargetError
from nscmerge.geometry import null_space_ratio
from tasks.classification import TextClassification
from tasks.finetune import FineTune
from tasks.omega import captured_omega
from tasks.regression import TextRegression
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert

LAYERS = ["query", "attention.output.dense"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_bert().save_pretrained(folder)
    return str(folder)


def trainer(folder, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        log_every_n_steps=1,
        **options,
    )


def module(base, task=None, **options):
    torch.manual_seed(0)
    task = task or TextClassification(2, WIDTH)
    return FineTune(task, base, "someone/tiny", rank=4, alpha=8, target_modules=LAYERS, lr=1e-2, **options)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_the_expert_folder_predicts_what_was_scored(base, tmp_path, classes, half):
    data = FakeTextDataModule(classes=classes, size=40)
    task = TextClassification(2, WIDTH) if classes else TextRegression(WIDTH)
    fine = module(base, task, half=half, name="tokens", output=tmp_path / "expert")
    trainer(tmp_path).fit(fine, datamodule=data)

    card = json.loads((tmp_path / "expert" / "expert.json").read_text())
    again = type(task)(**card["task"]["init_args"])
    adapter = load_adapter(tmp_path / "expert", name="tokens")
    again.load_head(adapter.head, "tokens")
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "expert").base_model.model
    metrics = again.metrics()
    for batch in DataLoader(data.dataset("test"), batch_size=5, collate_fn=collate):
        target = batch.pop("target")
        prediction = again(model, batch)
        torch.testing.assert_close(prediction, fine.eval()(batch), atol=1e-5, rtol=1e-4)
        metrics.update(prediction, target)
    scored = {name: float(value) for name, value in metrics.compute().items()}
    assert card["scores"]["test"] == pytest.approx(scored, abs=1e-5)
    assert set(card["scores"]) == {"val", "test"}
    assert card["base_model"]["id"] == adapter.base_model == "someone/tiny"
    assert len(card["base_model"]["sha256"]) == 64
    assert card["metric"] == {"primary": task.primary, "higher_is_better": True}
    assert card["head"] == {name: list(tensor.shape) for name, tensor in task.state_dict().items()}
    dtype = torch.float16 if half else torch.float32
    assert {layer.A.dtype for layer in adapter.layers.values()} == {dtype}
    assert len(adapter.layers) == 4
    assert any(bool(layer.B.any()) for layer in adapter.layers.values())


class Log:
    """A logger that remembers."""

    def __init__(self):
        self.seen = []

    def __call__(self):
        from lightning.pytorch.loggers import CSVLogger

        seen = self.seen

        class Remember(CSVLogger):
            def log_metrics(self, metrics, step=None):
                seen.append((step, dict(metrics)))

            def save(self):
                pass

        return Remember


def test_the_null_space_ratio_is_logged_before_and_while_training(base, tmp_path):
    log = Log()
    fine = module(base)
    logger = log()(tmp_path)
    trainer(tmp_path, logger=logger).fit(fine, datamodule=FakeTextDataModule(classes=True))
    ratios = [(step, m) for step, m in log.seen if "omega/mean" in m]
    assert [step for step, _ in ratios] == [0, 2, 5]  # untrained, then after each of two epochs of 3 steps
    names = {f"omega/encoder.layer.{i}.{leaf}" for i in (0, 1) for leaf in ("attention.self.query", LAYERS[1])}
    for _, metrics in ratios:
        assert names <= metrics.keys()
        assert metrics["omega/mean"] == pytest.approx(sum(metrics[n] for n in names) / 4, abs=1e-6)
        assert 0 < metrics["omega/mean"] < 1


def test_captured_omega_is_the_masked_mean_over_tokens():
    model, name = tiny_bert(), "encoder.layer.1.attention.self.query"
    samples = [FakeTextDataModule().dataset("val")[i] for i in range(6)]
    batch = collate(samples)
    batch.pop("target")
    A = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    with captured_omega(model, {name: A}, batch["attention_mask"]) as found:
        model(**batch)
    for row, sample in enumerate(samples):  # one by one, nothing is padded
        ids = sample["input_ids"][None]
        z = model(ids, output_hidden_states=True).hidden_states[1]
        assert float(found[name][row]) == pytest.approx(float(null_space_ratio(z, A).mean()), abs=1e-5)


def test_checkpoints_hold_what_was_trained_and_resume(base, tmp_path):
    data = FakeTextDataModule(classes=True)
    fine = module(base)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(fine, datamodule=data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=False)["state_dict"]
    assert all("lora_" in key or key.startswith("task.") for key in saved)
    other = module(base)
    trainer(tmp_path).test(other, datamodule=data, ckpt_path=tmp_path / "one.ckpt", weights_only=False, verbose=False)
    for key, value in fine.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_rank_0_is_the_frozen_probe(base, tmp_path):
    torch.manual_seed(0)
    probe = FineTune(TextClassification(2, WIDTH), base, rank=0)
    before = tiny_bert().state_dict()
    head = probe.task.linear.weight.clone()
    trainer(tmp_path).fit(probe, datamodule=FakeTextDataModule(classes=True))
    assert all(torch.equal(value, before[key]) for key, value in probe.model.state_dict().items())
    assert not torch.equal(probe.task.linear.weight, head)


def test_what_cannot_work_is_refused_before_any_work(base, tmp_path):
    with pytest.raises(OutputExistsError, match="is there already"):
        module(base, output=tmp_path)
    with pytest.raises(ConfigError, match="rank 0 trains no adapter"):
        FineTune(TextClassification(2), base, rank=0, output=tmp_path / "probe")
    with pytest.raises(TargetError, match=r"\['q_proj'\] name no linear layer of BertModel.*query"):
        FineTune(TextClassification(2), base, target_modules=["query", "q_proj"]).configure_model()
