"""Tokens of prompts against transformers' processor, labels against the rule of the official code."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from datamodules.base import IGNORED
from datamodules.twins.models import write_llama, write_llava
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import LLAVA_HF, VICUNA
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

IMAGE = Image.new("RGB", (50, 30), (200, 40, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def encoder(folder):
    return VLMEncoder.load(folder, LLAVA_HF)


def labelled_by_search(ids, tokenizer):
    """The official rule: from after the first tokens of "ASSISTANT:" to the first end token after them, inclusive."""
    header = tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]
    ids = ids.tolist()
    start = next(i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header)
    stop = ids.index(tokenizer.eos_token_id, start) + 1
    return [token if start <= i < stop else IGNORED for i, token in enumerate(ids)]


@pytest.mark.parametrize("text", ["What color?", None, "two\nlines and ünïcode"])
def test_prompts_are_the_tokens_of_the_processor(folder, encoder, text):
    got = encoder.inputs(text, IMAGE, "x")
    expected = AutoProcessor.from_pretrained(folder)(text=LLAVA_HF.prompt(text), images=IMAGE, return_tensors="pt")
    assert got.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert torch.equal(got["input_ids"], expected["input_ids"][0])
    assert torch.equal(got["attention_mask"], expected["attention_mask"][0])
    assert got["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(
        got["pixel_values"], expected["pixel_values"][0], rtol=0, atol=0.02
    )  # its own resampling


def test_the_picture_takes_four_tokens_and_is_left_out_with_them(encoder):
    image = encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert encoder.image_tokens == 4
    assert int((encoder.inputs("Q?", IMAGE, "x")["input_ids"] == image).sum()) == 4
    without = encoder.inputs("Q?", None, "x")
    assert "pixel_values" not in without
    assert not (without["input_ids"] == image).any()


@pytest.mark.parametrize("chat", [LLAVA_HF, VICUNA], ids=["hf", "vicuna"])
@pytest.mark.parametrize(
    "answer", ["red", "a dog: 12%, $3.50", "two lines\nof it", "ASSISTANT: again", "an</s> end", ""]
)
def test_labels_are_the_answer_and_its_end(folder, chat, answer):
    encoder = VLMEncoder.load(folder, chat)
    for image in (IMAGE, None):
        sample = encoder.supervised("What is it?", image, answer, "x")
        ids, target = sample["input_ids"], sample["target"]
        assert target.tolist() == labelled_by_search(ids, encoder.tokenizer)
        prompt = encoder.inputs("What is it?", image, "x")["input_ids"]
        assert torch.equal(ids[: len(prompt)], prompt)
        said = encoder.tokenizer.decode(target[target != IGNORED], skip_special_tokens=False)
        assert said == answer.partition("</s>")[0] + "</s>"


def test_a_sample_longer_than_the_context_is_named(folder):
    encoder = VLMEncoder.load(folder, LLAVA_HF, max_length=40)
    with pytest.raises(DataError, match=r"sample 7: it has \d+ tokens, 4 of them of its picture; 39 fit"):
        encoder.inputs("word " * 60, IMAGE, "sample 7")
    with pytest.raises(DataError, match=r"sample 7: it has \d+ tokens.*; 40 fit"):
        encoder.supervised("Q?", IMAGE, "word " * 60, "sample 7")
    assert VLMEncoder.load(folder, LLAVA_HF).context == 2048  # of the tokenizer and the model


def test_a_picture_in_the_text_or_the_answer_is_refused(encoder):
    with pytest.raises(DataError, match="sample 7: the text 'see <image>'"):
        encoder.inputs("see <image>", IMAGE, "sample 7")
    with pytest.raises(DataError, match="sample 7: the answer '<image>'"):
        encoder.supervised("Q?", IMAGE, "<image>", "sample 7")


def test_processors_that_are_not_a_llavas(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no folder"):
        VLMEncoder.load(str(tmp_path / "nowhere"), LLAVA_HF)
    with pytest.raises(ConfigError, match=r"llama' is a .*; expected that of a LLaVA"):
        VLMEncoder.load(str(write_llama(tmp_path / "llama")), LLAVA_HF)
    folder = write_llava(tmp_path / "llava")
    file = folder / "processor_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, "patch_size": None}))
    with pytest.raises(ConfigError, match=r"expected that of a LLaVA, with a tokenizer.*and a patch_size"):
        VLMEncoder.load(str(folder), LLAVA_HF)
