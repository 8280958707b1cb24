"""Heads on a decoder's last token: where it is, which classes count, and whose head it is."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from datamodules.twins.models import write_llama
from nscmerge.errors import AdapterError, ConfigError
from nscmerge.heads import predictions
from tasks.sequence_classification import MaskedAccuracy, SequenceClassification, last_token

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metric_nli_and_entropy.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder).eval().requires_grad_(False)


def task(seed=0, **options):
    torch.manual_seed(seed)
    return SequenceClassification(3, 32, **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_pooled_token_is_the_last_one_whichever_side_is_padded(folder, model, side):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["a", "a man sleeps in the sun", f"it ends in the pad token{tokenizer.eos_token}"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert 0 in batch["attention_mask"]
    head = task()
    got = head(model, batch)
    for row, text in enumerate(texts):  # one by one, nothing is padded and the last token is the last
        hidden = model(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
        alone = hidden.last_hidden_state[0, -1] @ head.linear.weight.T
        torch.testing.assert_close(got[row], alone, atol=2e-5, rtol=1e-4)


def test_last_token_by_hand():
    hidden = torch.arange(24.0).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert last_token(hidden, mask).tolist() == [[2, 3], [14, 15], [16, 17]]


def test_predictions_are_raw_and_only_loss_and_metric_know_the_mask(model):
    masked, plain = task(mask_class=1), task()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    logits = masked(model, batch)
    assert torch.equal(logits, plain(model, batch))
    target = torch.tensor([2])
    two = torch.nn.functional.cross_entropy(logits[:, [0, 2]], torch.tensor([1]))
    torch.testing.assert_close(masked.loss(logits, target), two)
    assert bool(plain.loss(logits, target) > two)
    confident = torch.tensor([[1.0, 9.0, 2.0], [3.0, 9.0, 2.0]])
    for head, expected in ((masked, 0.5), (plain, 0.0)):
        metrics = head.metrics()
        metrics.update(confident, torch.tensor([2, 2]))
        assert float(metrics.compute()["accuracy"]) == expected


def test_the_loss_is_finite_in_half_precision(model):
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = task(mask_class=0).loss(logits, torch.tensor([2]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad[0, 0]) == 0


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["task"])
def test_masked_accuracy_is_the_golden(case):
    logits, labels = torch.tensor(GOLDEN["logits"], dtype=torch.float64), torch.tensor(case["labels"])
    for mask_class, key in ((case["mask_class"], "accuracy"), (None, "accuracy_without_mask")):
        metric = MaskedAccuracy(3, mask_class)
        metric.update(logits[:5], labels[:5])
        metric.update(logits[5:], labels[5:])
        assert float(metric.compute()) == pytest.approx(case["expected"][key], abs=1e-12)


def test_each_head_is_used_for_its_task_alone(model):
    heads = {"mnli": task(0), "rte": task(1, mask_class=1)}
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    hidden = model(**batch).last_hidden_state[:, -1]
    found = dict(predictions(model, heads, batch))
    for name, head in heads.items():
        torch.testing.assert_close(found[name], hidden @ head.linear.weight.T)
    heads["rte"].loss(found["rte"], torch.tensor([2])).backward()
    assert heads["mnli"].linear.weight.grad is None
    assert float(heads["rte"].linear.weight.grad.abs().sum()) > 0


def test_heads_load_by_our_name_and_by_pefts():
    source, other = task(0), task(1)
    assert list(source.state_dict()) == ["linear.weight"]
    for name in ("linear.weight", "score.weight", "model.score.weight"):
        other.load_head({name: source.linear.weight.detach().half()}, "rte")
        torch.testing.assert_close(other.linear.weight, source.linear.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(AdapterError, match=r"the head of 'rte' has .*\(2, 32\).*expects .*\(3, 32\)"):
        other.load_head({"linear.weight": torch.zeros(2, 32)}, "rte")
    with pytest.raises(AdapterError, match=r"expert 'rte' has no head.safetensors, which SequenceClassification needs"):
        other.load_head({}, "rte")


def test_what_does_not_fit_is_refused(folder, model):
    with pytest.raises(ConfigError, match="mask_class is 3; expected one of the 3 classes"):
        SequenceClassification(3, 32, mask_class=3)
    with pytest.raises(ConfigError, match="the head reads 4096 features, LlamaModel has 32"):
        SequenceClassification(3).check(model)
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM gives no last_hidden_state .* AutoModel"):
        task()(AutoModelForCausalLM.from_pretrained(folder), batch)
    built = SequenceClassification(**task(mask_class=2).config()["init_args"])
    assert built.mask_class == 2
