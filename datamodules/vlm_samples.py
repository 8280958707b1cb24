"""Samples of vision-language tasks, made when they are asked for: pictures stay encoded until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import TARGET, LabelledDataset, Sample
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import Modality
from nscmerge.errors import ConfigError

#: Text, picture or None, answers.
Picked = tuple[str, Any, list[str]]
#: Returns a sample by its index; the flag says whether the picture is wanted.
Read = Callable[[int, bool], Picked]


class ScoredPrompts(LabelledDataset):
    """The prompt of every sample; ``target`` is the list of its accepted answers.

    Args:
        size: Number of samples.
        read: Returns one of them, with all accepted answers.
        name: Returns what messages call it.
        encoder: Makes tensors of it.
        modality: ``text`` leaves the picture out, its placeholder too; ``image`` the text.
    """

    def __init__(
        self, size: int, read: Read, name: Callable[[int], str], encoder: VLMEncoder, modality: Modality = "both"
    ) -> None:
        check_modality(modality)
        self._size, self._read, self._name = size, read, name
        self._encoder, self._modality = encoder, modality

    def __len__(self) -> int:
        return self._size

    def inputs(self, index: int) -> Sample:
        """Return ``input_ids``, ``attention_mask`` and, with the picture, ``pixel_values``."""
        text, image, _ = self._read(index, self._modality != "text")
        return self._encoder.inputs(None if self._modality == "image" else text, image, self._name(index))

    def target(self, index: int) -> Any:
        """Return the accepted answers."""
        return self._read(index, False)[2]

    def __getitem__(self, index: int) -> Sample:
        text, image, answers = self._read(index, self._modality != "text")
        inputs = self._encoder.inputs(None if self._modality == "image" else text, image, self._name(index))
        return {**inputs, TARGET: answers}


class AnsweredPrompts(Dataset[Sample]):
    """Prompt and answer, the answer's tokens as ``target``: what a training sees.

    Args:
        learned: (sample, number of the answer) of every sample of the training.
        read: As for :class:`ScoredPrompts`, but with the answers to learn.
        name: As there.
        encoder: As there.
        modality: As there.
    """

    def __init__(
        self,
        learned: Sequence[tuple[int, int]],
        read: Read,
        name: Callable[[int], str],
        encoder: VLMEncoder,
        modality: Modality = "both",
    ) -> None:
        check_modality(modality)
        self._learned, self._read, self._name = learned, read, name
        self._encoder, self._modality = encoder, modality

    def __len__(self) -> int:
        return len(self._learned)

    def __getitem__(self, index: int) -> Sample:
        sample, number = self._learned[index]
        text, image, answers = self._read(sample, self._modality != "text")
        text = None if self._modality == "image" else text
        return self._encoder.supervised(text, image, answers[number], self._name(sample))


def check_modality(modality: str) -> None:
    """Refuse an unknown modality.

    Raises:
        ConfigError: It is none of the three.
    """
    if modality not in ("both", "text", "image"):
        raise ConfigError(f"no modality '{modality}'; use 'both', 'text' (no picture) or 'image' (no text).")
