"""Tiny base models with random weights, in the layouts of the real ones: LLaMA, LLaVA-1.5, CLIP and Flan-T5.

Each writer makes a folder that ``from_pretrained`` reads without network: safetensors weights, tokenizer, processor.
The shapes follow ``shared/spec/language_tasks.md``, section 8; a seed fixes every weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from datamodules.twins.tokenizers import clip_tokenizer, llama_tokenizer, llava_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Longest input, in tokens: enough for a long premise spelled in bytes.
CONTEXT = 2048
#: Spread of random weights: 0.02 of real ones times the root of how much narrower the stand-ins are.
SPREAD = 0.15
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def write_llama(folder: str | Path, *, hidden: int = 32, layers: int = 4, seed: int = 0) -> Path:
    """Write a LLaMA with 4 attention and 2 key-value heads; its tokenizer has no pad token, as LLaMA-3's has none.

    Args:
        folder: Where to; made if it is not there.
        hidden: Width, a multiple of 4.
        layers: Number of blocks.
        seed: Of the weights.

    Returns:
        The folder.
    """
    from transformers import LlamaForCausalLM

    tokenizer = llama_tokenizer()
    with _seeded(seed):
        model = LlamaForCausalLM(_llama_config(tokenizer, hidden, layers))
        _sharpen(model.lm_head)
    return _save(folder, model, tokenizer)


def write_llava(folder: str | Path, *, hidden: int = 32, layers: int = 4, image_size: int = 28, seed: int = 0) -> Path:
    """Write a LLaVA-1.5: a 3-layer CLIP tower read at its last layer but one, a projector, and a LLaMA.

    Args:
        folder: Where to; made if it is not there.
        hidden: Width of both towers, a multiple of 4.
        layers: Number of language blocks.
        image_size: Side in pixels, a multiple of the patch size 14; 28 gives 4 image tokens.
        seed: Of the weights.

    Returns:
        The folder.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = llava_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        projection_dim=hidden,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(tokenizer, hidden, layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )
    with _seeded(seed):
        model = LlavaForConditionalGeneration(config)
        _spread(model.model.multi_modal_projector)
        _sharpen(model.lm_head)
    processor = LlavaProcessor(
        image_processor=_image_processor(image_size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    return _save(folder, model, processor)


def write_clip(folder: str | Path, *, hidden: int = 32, layers: int = 4, image_size: int = 32, seed: int = 0) -> Path:
    """Write a CLIP with both towers; the scale of its logits is 100, as trained ones have it.

    Args:
        folder: Where to; made if it is not there.
        hidden: Width of both towers, a multiple of 4.
        layers: Number of vision blocks; the text tower has 2.
        image_size: Side in pixels, a multiple of the patch size 8.
        seed: Of the weights.

    Returns:
        The folder.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

    tokenizer = clip_tokenizer()
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "projection_dim": hidden,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(num_hidden_layers=layers, image_size=image_size, patch_size=8, **shape)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=hidden, logit_scale_init_value=4.6052
    )
    with _seeded(seed):
        model = CLIPModel(config)
        # Wide enough that different class names give clearly different embeddings.
        _spread(model.text_model)
    processor = CLIPProcessor(image_processor=_image_processor(image_size), tokenizer=tokenizer)
    return _save(folder, model, processor)


def write_t5(folder: str | Path, *, hidden: int = 32, layers: int = 4, seed: int = 0) -> Path:
    """Write a Flan-T5: gated feed-forward layers, an output layer of its own, longest input 512.

    Args:
        folder: Where to; made if it is not there.
        hidden: Width, a multiple of 4.
        layers: Number of blocks of encoder and of decoder.
        seed: Of the weights.

    Returns:
        The folder.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with _seeded(seed):
        model = T5ForConditionalGeneration(config)
    return _save(folder, model, tokenizer)


def _llama_config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
        num_labels=3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _image_processor(size: int) -> Any:
    """Return CLIP's image processor in the form that needs Pillow alone."""
    import transformers

    # Since transformers 5 the plain name needs torchvision too; before, it was the one that needs Pillow alone.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the generator of the caller as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    """Draw every matrix of a module anew, with the spread of the stand-ins."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, SPREAD)


@torch.no_grad()
def _sharpen(head: nn.Module) -> None:
    """Draw the output layer so that logits of a narrow model reach far enough apart for confident answers."""
    for parameter in head.parameters():
        parameter.normal_(0, 0.5)


def _save(folder: str | Path, *parts: Any) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)
    return folder
