"""Prompts, byte for byte: the table of the protocol typed out again, and the template of llava-hf."""

import pytest

from datamodules.llava4 import naming_text
from datamodules.twins.tokenizers import llava_tokenizer
from datamodules.vlm_prompts import LLAVA_HF, VICUNA, user_text
from nscmerge.errors import ConfigError, DataError

Q = "What is the 2nd bar's value?"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
CAPTION = "Provide a one-sentence caption for the provided image."
ICON = "Given a set of images and a question, please provide the answer to the question.\nQuestion: "


@pytest.mark.parametrize(
    ("task", "style", "expected"),
    [
        ("iconqa", "code", Q),
        ("iconqa", "paper", f"{Q}\nAnswer the question using a single word."),
        ("iconqa", "lmms_eval", f"{ICON}{Q}.\nPlease answer the question using a single word or phrase."),
        ("vizwiz", "code", f"{Q}\n{UNANSWERABLE}\nAnswer the question using a single word or phrase."),
        ("vizwiz", "paper", f"{Q}\nAnswer the question using a single word."),
        (
            "vizwiz",
            "lmms_eval",
            f"What is the 2nd bar's value?\n{UNANSWERABLE}\nAnswer the question using a single word or phrase.",
        ),
        ("chartqa", "code", f"{Q}\nAnswer the question with a single word."),
        ("chartqa", "paper", f"{Q}\nAnswer the question using a single word or short phrase."),
        ("chartqa", "lmms_eval", f"{Q}\nAnswer the question with a single word."),
        ("docvqa", "code", f"{Q}\nAnswer the question with a single word."),
        ("docvqa", "paper", f"{Q}\nAnswer the question using a single word or short phrase."),
        ("docvqa", "lmms_eval", f"{Q}\nAnswer the question using a single word or phrase."),
        *[(task, style, CAPTION) for task in ("coco", "flickr30k") for style in ("code", "paper", "lmms_eval")],
    ],
)
def test_what_the_user_says(task, style, expected):
    assert user_text(task, style, Q) == expected


def test_lmms_eval_capitalises_the_question_of_vizwiz():
    assert user_text("vizwiz", "lmms_eval", "is this a BMW?").startswith("Is this a bmw?\n")
    assert user_text("vizwiz", "code", "is this a BMW?").startswith("is this a BMW?\n")


def test_iconqa_with_choices():
    assert user_text("iconqa", "code", Q, ["a", "b"]) == f"{Q}\nChoices: a, b\nAnswer the question using a single word."
    assert user_text("iconqa", "paper", Q, ["a", "b"]) == user_text("iconqa", "code", Q, ["a", "b"])
    assert user_text("iconqa", "code", Q, []) == f"{Q}\nAnswer the question using a single word."
    assert user_text("iconqa", "lmms_eval", Q, ["a", "b"]) == (
        f"{ICON}{Q}.\nOptions:\nA. a\nB. b\nPlease answer with the option letter from the given choices directly."
    )


def test_the_chat_of_llava_hf():
    assert LLAVA_HF.prompt(Q) == f"USER: <image>\n{Q} ASSISTANT:"
    assert LLAVA_HF.prompt(None) == "USER: <image>\nASSISTANT:"
    assert LLAVA_HF.prompt(Q, image=False) == f"USER: {Q} ASSISTANT:"
    assert LLAVA_HF.answered(LLAVA_HF.prompt(Q), "12") == f"USER: <image>\n{Q} ASSISTANT: 12</s> "


@pytest.mark.parametrize(("text", "image"), [(Q, True), (None, True), (Q, False)])
def test_it_is_what_the_template_renders(text, image):
    content = [{"type": "image"}] * image + [{"type": "text", "text": text}] * (text is not None)
    turns = [{"role": "user", "content": content}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "two words"}]}
    render = llava_tokenizer().apply_chat_template
    prompt = LLAVA_HF.prompt(text, image=image)
    assert prompt == render(turns, tokenize=False, add_generation_prompt=True)
    assert LLAVA_HF.answered(prompt, "two words") == render([*turns, answer], tokenize=False)


def test_the_chat_of_the_original_llava():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    prompt = VICUNA.prompt(Q)
    assert prompt == f"{system} USER: <image>\n{Q} ASSISTANT:"
    assert VICUNA.answered(prompt, "B") == f"{prompt} B</s>"


def test_imagenet_is_asked_with_a_hundred_names():
    text = naming_text("What is this?\nOld choices: x, y.")
    first, second = text.split("\n")
    assert first == "What is this?"
    assert second.startswith("Choose an answer from the choices below: Doormat, Pomeranian, Chime, ")
    assert second.endswith(", Gasmask, Lemon, Bernese mountain dog.")
    assert second.count(", ") == 99


def test_errors():
    with pytest.raises(ConfigError, match="no prompt style 'own'"):
        user_text("coco", "own")
    with pytest.raises(ConfigError, match="task 'vqav2'; known: iconqa, vizwiz"):
        user_text("vqav2", "code")
    with pytest.raises(ConfigError, match="asks nothing"):
        LLAVA_HF.prompt(None, image=False)
    with pytest.raises(DataError, match="'see <image>' has '<image>' in it"):
        LLAVA_HF.prompt("see <image>")
