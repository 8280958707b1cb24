"""Samples of vision-language tasks, made when they are asked for: pictures stay encoded until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from datamodules.base import LabelledDataset, Sample
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import Modality
from nscmerge.errors import ConfigError


class Samples(Protocol):
    """What is asked of which picture, and the answers, by the index of a sample."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what messages call it: data set and sample."""

    def ask(self, index: int, picture: bool) -> tuple[str, Any]:
        """Return what the user says and the RGB picture, None where there is none or it is not wanted."""

    def answers(self, index: int) -> list[str]:
        """Return all accepted answers."""


class ScoredPrompts(LabelledDataset):
    """The prompt of every sample; ``target`` is the list of its accepted answers.

    Args:
        samples: What to ask.
        encoder: Makes tensors of it.
        modality: ``text`` leaves the picture out, its placeholder too; ``image`` the text.
    """

    def __init__(self, samples: Samples, encoder: VLMEncoder, modality: Modality = "both") -> None:
        check_modality(modality)
        self._samples, self._encoder, self._modality = samples, encoder, modality

    def __len__(self) -> int:
        return len(self._samples)

    def inputs(self, index: int) -> Sample:
        """Return ``input_ids``, ``attention_mask`` and, with the picture, ``pixel_values``; reads no answer."""
        text, image = _asked(self._samples, index, self._modality)
        return self._encoder.inputs(text, image, self._samples.name(index))

    def target(self, index: int) -> Any:
        """Return the accepted answers; decodes no picture."""
        return self._samples.answers(index)


class AnsweredPrompts(Dataset[Sample]):
    """Prompt and answer, the answer's tokens as ``target``: what a training sees.

    Args:
        samples: What to ask.
        lessons: (sample, number of the answer) of every sample of the training.
        encoder: Makes tensors of it.
        modality: As for :class:`ScoredPrompts`.
    """

    def __init__(
        self, samples: Samples, lessons: Sequence[tuple[int, int]], encoder: VLMEncoder, modality: Modality = "both"
    ) -> None:
        check_modality(modality)
        self._samples, self._lessons = samples, lessons
        self._encoder, self._modality = encoder, modality

    def __len__(self) -> int:
        return len(self._lessons)

    def __getitem__(self, index: int) -> Sample:
        sample, number = self._lessons[index]
        text, image = _asked(self._samples, sample, self._modality)
        return self._encoder.supervised(text, image, self._samples.answers(sample)[number], self._samples.name(sample))


def _asked(samples: Samples, index: int, modality: Modality) -> tuple[str | None, Any]:
    text, image = samples.ask(index, modality != "text")
    return None if modality == "image" else text, image


def check_modality(modality: str) -> None:
    """Refuse an unknown modality.

    Raises:
        ConfigError: It is none of the three.
    """
    if modality not in ("both", "text", "image"):
        raise ConfigError(f"no modality '{modality}'; use 'both', 'text' (no picture) or 'image' (no text).")
