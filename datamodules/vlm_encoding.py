"""Prompt, picture and answer to the tensors of a LLaVA: the placeholder becomes image tokens, the answer labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.base import IGNORED, TARGET, Sample
from datamodules.images import ImageMode, ImageTransform
from datamodules.tokenizer import load_pretrained
from datamodules.vlm_prompts import IMAGE, Chat
from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError, DataError


@dataclass(frozen=True)
class VLMEncoder:
    """What turns one sample into tensors.

    Args:
        tokenizer: Of the language model; it adds the BOS token.
        transform: What the vision tower sees of a picture.
        chat: The words around text and picture.
        image_tokens: Positions that one picture takes.
        context: Most positions that the model has.
    """

    tokenizer: Any
    transform: ImageTransform
    chat: Chat
    image_tokens: int
    context: int

    @classmethod
    def load(
        cls, source: str, chat: Chat, image_mode: ImageMode = "center_crop", max_length: int | None = None
    ) -> VLMEncoder:
        """Return the encoder of a LLaVA's folder or hub id.

        Args:
            source: Of the processor, as :func:`nscmerge.base_model.resolve_source` reads it.
            chat: The words around text and picture.
            image_mode: See :class:`datamodules.images.ImageTransform`.
            max_length: Most tokens of a sample; None takes what tokenizer and model allow.

        Raises:
            ConfigError: It is not the processor of a LLaVA.
            DatasetNotFoundError: It cannot be had from there.
        """
        processor = load_pretrained("AutoProcessor", source)
        tokenizer, images = getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)
        patch = getattr(processor, "patch_size", None)
        if tokenizer is None or images is None or not patch:
            raise ConfigError(
                f"processor '{source}' is a {type(processor).__name__}; expected that of a LLaVA, with a tokenizer, an "
                "image processor and a patch_size. Name the folder or hub id of the base model."
            )
        if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
            raise ConfigError(f"the tokenizer of '{source}' has no token '{IMAGE}'; expected that of a LLaVA.")
        transform = ImageTransform.of(images, image_mode)
        if transform.crop is None:
            raise ConfigError(
                f"the image processor of '{source}' cuts nothing, so pictures differ in size; expected CLIP's."
            )
        height, width = transform.crop
        # The class token is one more, which the feature strategy "default" leaves out again.
        extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
        count = (height // patch) * (width // patch) + extra
        return cls(tokenizer, transform, chat, count, max_length or _context(source, tokenizer))

    def inputs(self, text: str | None, image: Any, where: str) -> Sample:
        """Return the prompt alone: ``input_ids``, ``attention_mask`` and, with a picture, ``pixel_values``.

        Args:
            text: What the user says; None leaves it out.
            image: An RGB image; None leaves it out, its placeholder too.
            where: Data set and sample, for messages.

        Raises:
            DataError: It does not fit into the context.
        """
        return self._sample(self._tokens(self._prompt(text, image, where), where, room=1), image)

    def supervised(self, text: str | None, image: Any, answer: str, where: str) -> Sample:
        """Return prompt and answer, and ``target``: the token ids of the answer and its end, all else ignored.

        Raises:
            DataError: It does not fit into the context, or its tokens do not begin with those of the prompt.
        """
        if IMAGE in answer:
            raise DataError(
                f"{where}: the answer {answer[:80]!r} has '{IMAGE}' in it, which would be read as a picture."
            )
        prompt = self._prompt(text, image, where)
        before = self._tokens(prompt, where)
        ids = self._tokens(self.chat.answered(prompt, answer), where)
        start = len(before)
        ends = (ids[start:] == self.tokenizer.eos_token_id).nonzero()
        if not torch.equal(ids[:start], before) or not len(ends):
            raise DataError(
                f"{where}: the tokens of prompt and answer do not begin with those of the prompt or have no end token "
                f"({self.tokenizer.eos_token!r}), so the answer cannot be told apart. Use the tokenizer of a LLaVA."
            )
        stop = start + int(ends[0]) + 1
        target = torch.full_like(ids, IGNORED)
        target[start:stop] = ids[start:stop]
        return {**self._sample(ids, image), TARGET: target}

    def _prompt(self, text: str | None, image: Any, where: str) -> str:
        try:
            return self.chat.prompt(text, image=image is not None)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{where}: {error}") from error

    def _tokens(self, prompt: str, where: str, room: int = 0) -> Tensor:
        spread = prompt.replace(IMAGE, IMAGE * self.image_tokens, 1)
        ids = torch.tensor(self.tokenizer(spread, verbose=False)["input_ids"])
        if len(ids) + room > self.context:
            raise DataError(
                f"{where}: it has {len(ids)} tokens, {self.image_tokens if IMAGE in prompt else 0} of them of its "
                f"picture; {self.context - room} fit. Remove the sample, or raise max_length if the model allows it."
            )
        return ids

    def _sample(self, ids: Tensor, image: Any) -> Sample:
        pixels = {} if image is None else {"pixel_values": self.transform(image)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def _context(source: str, tokenizer: Any) -> int:
    """Return the shorter of what the tokenizer and the model beside it allow."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_source(source)).get_text_config()
    except (OSError, ValueError):
        return int(tokenizer.model_max_length)
    return min(
        int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    )
