"""Tokenizers of the tiny base models: byte-level BPE over a few lines, with the special tokens of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: What the merges are learned from: the frames of the prompts, and frequent words of their answers.
LINES = (
    "USER: ASSISTANT: Answer the question using a single word or phrase.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "Provide a one-sentence caption for the provided image. Answer the question with a single word.",
    "Choose an answer from the choices below: Answere with 'entailment', 'contradiction', or 'neutral'.",
    "Indicate if the following sentence is grammatically correct or not: 'acceptable' or 'unacceptable'.",
    "Does the premise logically imply, contradict, or is neutral to the hypothesis? yes or no, positive or negative",
    "On a scale from 1 (completely different) to 5 (completely similar), rate the similarity of the sentences.",
    "a photo of the number, a centered satellite photo of the land, a photo of a texture, a type of food.",
    "red green blue yellow black white square circle triangle one two three four five large small",
)
#: LLaVA-1.5's: role names in capitals, images before text, no system prompt; an answer ends with the eos token.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + '</s> ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like LLaMA-3's: no pad token, and a pair is BOS A BOS B, without an end."""
    bos = "<|begin_of_text|>"
    return _wrap(
        _bpe([bos, "<|end_of_text|>"], template=(f"{bos} $A", f"{bos} $A {bos} $B:1"), blank=False),
        bos_token=bos,
        eos_token="<|end_of_text|>",
        model_max_length=2048,
    )


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like LLaVA-1.5's: BOS before the text, pads on the left, an image token, its chat template."""
    tokenizer = _wrap(
        _bpe(["<s>", "</s>", "<unk>", "<image>", "<pad>"], template=("<s> $A", "<s> $A <s> $B:1"), blank=True),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.chat_template = LLAVA_CHAT
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like CLIP's: lower case, start and end of text, padded with the end, at most 77 tokens."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    return _wrap(
        _bpe([start, end], template=(f"{start} $A {end}", f"{start} $A {end} {start} $B:1 {end}"), lower=True),
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=77,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's: pad 0, end of text 1 after every text, at most 512 tokens."""
    return _wrap(
        _bpe(["<pad>", "</s>", "<unk>"], template=("$A </s>", "$A </s> $B:1 </s>")),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
    )


def _bpe(special: Sequence[str], template: tuple[str, str], blank: bool = True, lower: bool = False) -> Any:
    """Return a byte-level BPE of 400 entries and more.

    Args:
        special: Special tokens, which get the first ids.
        template: Of one text and of a pair.
        blank: Start every text with a blank and drop it again in decoding, as SentencePiece models do.
        lower: Lower-case the text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    undo = [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)] if blank else [decoders.ByteLevel()]
    tokenizer.decoder = decoders.Sequence(undo)
    trainer = trainers.BpeTrainer(
        vocab_size=400 + 16 * len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template[0], pair=template[1], special_tokens=[(s, tokenizer.token_to_id(s)) for s in special]
    )
    return tokenizer


def _wrap(tokenizer: Any, **options: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
