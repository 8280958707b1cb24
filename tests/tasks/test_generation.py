"""Generated answers: the loss against transformers' own, greedy decoding against a plain loop, and what is refused."""

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from datamodules.twins.models import write_llama, write_llava, write_t5
from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError, DataError
from nscmerge.objectives.greedy import greedy_answer, start_decoder
from nscmerge.pretrained import Pretrained
from tasks.generation import GreedyAnswers, TokenAccuracy, left_padded
from tasks.text_to_text import TextToText
from tasks.vqa import VizWizVQA

PROMPTS = ["USER: <image>\nASSISTANT:", "USER: <image>\nWhich colour has the circle? ASSISTANT:"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = str(write_llava(tmp_path_factory.mktemp("llava") / "base"))
    return folder, load_base_model(Pretrained(folder, "AutoModelForImageTextToText"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = str(write_t5(tmp_path_factory.mktemp("t5") / "base"))
    return folder, load_base_model(Pretrained(folder, "AutoModelForSeq2SeqLM"))


def vlm_batch(folder, prompts=PROMPTS, side="right"):
    """Return the prompts with a dark and a light image, padded on one side with 0, as collate pads."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folder)
    samples = [
        processor(text=text, images=Image.new("RGB", (40, 28), (90 * i + 20, 40, 60)), return_tensors="pt")
        for i, text in enumerate(prompts)
    ]
    longest = max(s["input_ids"].shape[1] for s in samples)

    def padded(tensor):
        missing = longest - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (0, missing) if side == "right" else (missing, 0))

    batch = {key: torch.cat([padded(s[key]) for s in samples]) for key in ("input_ids", "attention_mask")}
    return batch | {"pixel_values": torch.cat([s["pixel_values"] for s in samples])}


def test_left_padded_moves_the_padding_and_keeps_the_order():
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [0, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]])
    pixels = torch.rand(3, 3, 2, 2)
    moved = left_padded({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    assert moved["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 3], [0, 0, 0, 4]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert torch.equal(moved["pixel_values"], pixels)
    assert torch.equal(left_padded(moved)["input_ids"], moved["input_ids"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_of_a_padded_batch_are_those_of_a_plain_greedy_loop(llava, side):
    folder, model = llava
    task = VizWizVQA(folder, max_new_tokens=6)
    task.check(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = task.evaluator()(model, vlm_batch(folder, side=side))
    for row, prompt in enumerate(PROMPTS):
        batch = vlm_batch(folder)
        sample = vlm_batch(folder, [prompt]) | {"pixel_values": batch["pixel_values"][row : row + 1]}
        tokens = greedy_answer(model, sample, eos={tokenizer.eos_token_id}, most=6)
        assert answers[row] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answers[0] != answers[1]


def test_an_encoder_decoder_answers_without_its_start_token(t5):
    folder, model = t5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Given the sentence 'fine', determine the sentiment.", "no"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    task = TextToText(folder)
    answers = task.evaluator()(model, batch)
    assert answers == task.evaluator()(model, {**batch, "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)})
    for answer, text in zip(answers, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        sample = {key: alone[key] for key in ("input_ids", "attention_mask")}
        tokens = greedy_answer(model, start_decoder(model, sample), eos={1}, most=9)
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_nothing_is_sampled_whatever_the_checkpoint_says(llava):
    folder, model = llava
    task, batch = VizWizVQA(folder, max_new_tokens=4), vlm_batch(folder)
    expected = task.evaluator()(model, batch)
    config = model.generation_config
    config.do_sample, config.temperature, config.num_beams = True, 5.0, 3
    try:
        assert task.evaluator()(model, batch) == expected
    finally:
        config.do_sample, config.temperature, config.num_beams = False, None, 1


def test_an_answer_that_ends_at_once_is_empty_and_counted(llava):
    folder, model = llava
    task, batch = VizWizVQA(folder, max_new_tokens=5), vlm_batch(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weight = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.zero_()  # all logits are equal, and the first token wins: <s>, which is special
        answers = task.evaluator()(model, batch)
    finally:
        model.lm_head.weight.copy_(weight)
    assert answers == ["", ""]
    assert tokenizer.all_special_ids[0] == 0
    metrics = task.metrics()
    metrics.update(answers, [["red"] * 10, [""] * 10])
    scores = {name: float(value) for name, value in metrics.compute().items()}
    assert scores == {"vqa_accuracy": 0.5, "empty_answers": 2}


def test_the_loss_is_that_of_transformers(llava):
    folder, model = llava
    task, batch = VizWizVQA(folder), vlm_batch(folder)
    target = batch["input_ids"].clone()
    target[:, :6] = -100
    target[batch["attention_mask"] == 0] = -100
    loss = task.loss(task(model, batch), target)
    torch.testing.assert_close(loss, model(**batch, labels=target).loss)


def test_the_loss_of_an_encoder_decoder_is_not_shifted(t5):
    folder, model = t5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a b c", "d"], padding=True, return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = tokenizer(["yes", "positive"], padding=True, return_tensors="pt")
    target = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    begun = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels["input_ids"][:, :-1]], 1)
    prediction = TextToText(folder)(model, {**batch, "decoder_input_ids": begun})
    torch.testing.assert_close(TextToText(folder).loss(prediction, target), model(**batch, labels=target).loss)
    alone = TextToText(folder)(model, batch)  # no answer yet: the decoder's start
    torch.testing.assert_close(alone, prediction[:, :1])


@pytest.mark.parametrize("shift", [True, False])
def test_token_accuracy_counts_answer_tokens(shift):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 0, 0, 1], [-100, -100, -100, -100, 2]])
    right = total = 0
    for row in range(3):
        for t in range(5):
            place = t - 1 if shift else t
            if place >= 0 and target[row, t] != -100:
                total += 1
                right += int(logits[row, place].argmax() == target[row, t])
    metric = TokenAccuracy(shift)
    metric.update(logits[:1], target[:1])
    metric.update(logits[1:], target[1:])
    assert float(metric.compute()) == pytest.approx(right / total)
    assert 0 < right < total


def test_what_cannot_be_learned_or_generated_is_refused(llava, tmp_path):
    folder, _ = llava
    task = VizWizVQA(folder)
    plain = load_base_model(str(write_llama(tmp_path / "llama")))
    with pytest.raises(ConfigError, match=r"LlamaModel has no language head.*AutoModelForCausalLM"):
        task.check(plain)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        VizWizVQA(folder, max_new_tokens=0)
    with pytest.raises(DataError, match="no token of a batch belongs to an answer"):
        task.loss(torch.zeros(1, 3, 4), torch.full((1, 3), -100))
    with pytest.raises(DataError, match=r"logits at \(1, 3\) positions, labels at \(1, 2\)"):
        task.loss(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"tokenizer '.*nowhere' cannot be loaded.*base model's folder"):
        VizWizVQA(str(tmp_path / "nowhere")).evaluator()


def test_a_decoder_of_texts_alone_is_scored_too(tmp_path):
    folder = str(write_llama(tmp_path / "llama"))
    model = load_base_model(Pretrained(folder, "AutoModelForCausalLM"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = GreedyAnswers(tokenizer, 4)  # no pad token: the end serves
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 9], [8, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    alone = {key: value[1:, :2] for key, value in batch.items()}
    assert answers(model, batch)[1:] == answers(model, alone)
