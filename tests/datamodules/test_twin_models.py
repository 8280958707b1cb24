"""The tiny base models: readable without network, the same every time, with the tokenizers' habits of the real ones."""

import hashlib

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from datamodules.twins.models import write_clip, write_llama, write_llava, write_t5

WRITERS = {"llama": write_llama, "llava": write_llava, "clip": write_clip, "t5": write_t5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    return {name: write(root / name) for name, write in WRITERS.items()}


def digest(folder):
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors", ".jinja")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("name", WRITERS)
def test_a_seed_fixes_every_file_and_nobody_elses_draws(name, folders, tmp_path):
    torch.manual_seed(5)
    again = WRITERS[name](tmp_path / "again")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert digest(again) == digest(folders[name])
    other = WRITERS[name](tmp_path / "other", seed=1)
    assert digest(other)["model.safetensors"] != digest(again)["model.safetensors"]


def test_llama_pairs_start_twice_and_there_is_no_pad(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    assert tokenizer.pad_token is None
    bos = [tokenizer.bos_token_id]
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a man", "no one, Ω!"))
    assert tokenizer("a man", "no one, Ω!")["input_ids"] == bos + first + bos + second
    assert tokenizer.decode(second) == "no one, Ω!"
    model = AutoModel.from_pretrained(folders["llama"])
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_key_value_heads) == (4, 32, 2)
    assert model(**tokenizer("a man", return_tensors="pt")).last_hidden_state.shape == (1, 1 + len(first), 32)


def test_sizes_are_options(tmp_path):
    model = AutoModel.from_pretrained(write_llama(tmp_path / "deep", hidden=16, layers=6))
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 16)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["image", "What?"], "USER: <image>\nWhat? ASSISTANT:"),
        (["image"], "USER: <image>\nASSISTANT:"),
        (["What?"], "USER: What? ASSISTANT:"),
    ],
)
def test_llava_renders_like_the_real_one(folders, content, text):
    processor = AutoProcessor.from_pretrained(folders["llava"])
    parts = [{"type": "image"} if c == "image" else {"type": "text", "text": c} for c in content]
    user = {"role": "user", "content": parts}
    assert processor.apply_chat_template([user], add_generation_prompt=True) == text
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    assert processor.apply_chat_template([user, answer]) == f"{text} yes</s> "


def test_llava_has_four_image_tokens_and_answers_without_a_leading_blank(folders):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folders["llava"])
    tokenizer = processor.tokenizer
    batch = processor(text="USER: <image>\nASSISTANT:", images=Image.new("RGB", (50, 30)), return_tensors="pt")
    assert int((batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum()) == 4
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert int(batch["input_ids"][0, 0]) == tokenizer.bos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer(" yes, no", add_special_tokens=False)["input_ids"]) == "yes, no"
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    names = {name for name, _ in model.named_modules()}
    assert {f"model.language_model.layers.{i}.self_attn.v_proj" for i in range(4)} <= names
    assert {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"} <= names
    logits = model(**batch).logits
    assert logits.shape[1] == batch["input_ids"].shape[1]
    other = processor(text="USER: <image>\nASSISTANT:", images=Image.new("RGB", (50, 30), "red"), return_tensors="pt")
    assert not torch.allclose(model(**other).logits[0, -1], logits[0, -1], atol=1e-3)  # it sees the image


def test_clip_towers_share_a_space_and_texts_are_cut_at_77(folders):
    processor = AutoProcessor.from_pretrained(folders["clip"])
    long = processor.tokenizer(["A B" * 200, "A"], truncation=True, padding=True)["input_ids"]
    assert {len(ids) for ids in long} == {77}
    assert processor.tokenizer("A Bee")["input_ids"] == processor.tokenizer("a bee")["input_ids"]
    whole = CLIPModel.from_pretrained(folders["clip"])
    assert float(whole.logit_scale.exp().detach()) == pytest.approx(100, rel=1e-4)
    vision = CLIPVisionModelWithProjection.from_pretrained(folders["clip"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pooled = whole.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(vision(pixel_values=pixels).image_embeds, whole.visual_projection(pooled))


def test_t5_ends_texts_and_starts_answers_with_pad(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["t5"])
    ids = tokenizer("not_equivalent 3.5")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "not_equivalent 3.5"
    assert tokenizer.model_max_length == 512
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"])
    tokens = model.generate(torch.tensor([ids]), max_length=10, do_sample=False)
    assert int(tokens[0, 0]) == tokenizer.pad_token_id == 0
    assert tokens.shape[1] <= 10
