"""What a vision-language model is asked, byte for byte: the words of each task, and the chat around them.

Three styles of the same six tasks: ``code``, as the official code of NSC (arXiv:2603.26317) asks; ``paper``, its
Table 7; ``lmms_eval``, the sentences of lmms-eval, to compare with numbers from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nscmerge.errors import ConfigError, DataError

Style = Literal["code", "paper", "lmms_eval"]
Modality = Literal["both", "text", "image"]

#: Stands for the picture; the tokens of the picture take its place.
IMAGE = "<image>"
END = "</s>"
#: Captioning has no question; this is all the user says.
CAPTION = "Provide a one-sentence caption for the provided image."

_WORD = "\nAnswer the question using a single word."
_WORD_OR_PHRASE = "\nAnswer the question using a single word or phrase."
_SHORT_PHRASE = "\nAnswer the question using a single word or short phrase."
_WITH_A_WORD = "\nAnswer the question with a single word."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

#: What follows the question. IconQA asked by ``lmms_eval`` is worded in :func:`iconqa_text`.
SUFFIXES: dict[str, dict[Style, str]] = {
    "iconqa": {"code": "", "paper": _WORD},
    "vizwiz": {
        "code": _UNANSWERABLE + _WORD_OR_PHRASE,
        "paper": _WORD,
        "lmms_eval": _UNANSWERABLE + _WORD_OR_PHRASE,
    },
    "chartqa": {"code": _WITH_A_WORD, "paper": _SHORT_PHRASE, "lmms_eval": _WITH_A_WORD},
    "docvqa": {"code": _WITH_A_WORD, "paper": _SHORT_PHRASE, "lmms_eval": _WORD_OR_PHRASE},
}
CAPTIONING = ("coco", "flickr30k")


def letter(index: int) -> str:
    """Return the letter of a choice: 0 is A."""
    return chr(ord("A") + index)


def iconqa_text(question: str, choices: Sequence[str] | None, style: Style) -> str:
    """Return the words of one IconQA question.

    Args:
        question: As the data have it.
        choices: The answers to choose from; empty for a question that is to be filled in; None where the data say
            nothing of choices, so that the question is complete as it is stored, as the official code has it.
        style: ``code`` leaves a complete question alone, else adds the choices and the paper's sentence (how the
            official sets write them is not published); ``lmms_eval`` letters the choices and asks for the letter.
    """
    if style == "lmms_eval":
        head = "Given a set of images and a question, please provide the answer to the question.\n"
        if not choices:
            return f"{head}Question: {question}.\nPlease answer the question using a single word or phrase."
        lettered = "\n".join(f"{letter(i)}. {choice}" for i, choice in enumerate(choices))
        ask = "Please answer with the option letter from the given choices directly."
        return f"{head}Question: {question}.\nOptions:\n{lettered}\n{ask}"
    listed = f"\nChoices: {', '.join(choices)}" if choices else ""
    suffix = _WORD if choices is not None else SUFFIXES["iconqa"][style]
    return question + listed + suffix


def user_text(task: str, style: Style, question: str = "", choices: Sequence[str] | None = None) -> str:
    """Return all that the user says in one task, without the chat around it.

    Args:
        task: ``iconqa``, ``vizwiz``, ``chartqa``, ``docvqa``, ``coco`` or ``flickr30k``.
        style: Whose words.
        question: The question of the sample; captioning has none.
        choices: See :func:`iconqa_text`; other tasks have none.

    Raises:
        ConfigError: The task or the style is unknown.
    """
    if style not in ("code", "paper", "lmms_eval"):
        raise ConfigError(f"no prompt style '{style}'; use 'code', 'paper' or 'lmms_eval'.")
    if task in CAPTIONING:
        return CAPTION
    if task not in SUFFIXES:
        raise ConfigError(f"no prompt for the task '{task}'; known: {', '.join((*SUFFIXES, *CAPTIONING))}.")
    if task == "iconqa":
        return iconqa_text(question, choices, style)
    if task == "vizwiz" and style == "lmms_eval":
        question = question.capitalize()  # as there: the rest of the question turns lower-case
    return question + SUFFIXES[task][style]


@dataclass(frozen=True)
class Chat:
    """One turn of a user and the start of the assistant's.

    Args:
        system: A sentence before it, with the blank after it.
        after_answer: What follows an answer in training; the labels end with :data:`END`.
    """

    system: str = ""
    after_answer: str = END

    def prompt(self, text: str | None, *, image: bool = True) -> str:
        """Return the prompt; without ``text`` the picture alone, without ``image`` the text alone, no placeholder left.

        Raises:
            ConfigError: Nothing is left to say.
            DataError: The text itself has the placeholder of a picture in it.
        """
        if not text and not image:
            raise ConfigError("a prompt without a picture and without text asks nothing; keep one of the two.")
        if text and IMAGE in text:
            raise DataError(f"the text {text[:80]!r} has '{IMAGE}' in it, which would be read as one more picture.")
        picture = f"{IMAGE}\n" if image else ""
        return f"{self.system}USER: {picture}{f'{text} ' if text else ''}ASSISTANT:"

    def answered(self, prompt: str, answer: str) -> str:
        """Return what training sees: the prompt, the answer, its end."""
        return f"{prompt} {answer}{self.after_answer}"


#: The template of llava-hf/llava-1.5-7b-hf: a blank follows every piece of content, that after the end included.
LLAVA_HF = Chat(after_answer=f"{END} ")
#: The conversation vicuna_v1 of the original LLaVA.
VICUNA = Chat(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
