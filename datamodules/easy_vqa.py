"""easy-VQA (Zhou, 2019): questions about rendered shapes, read where the package ``easy-vqa`` is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset

from datamodules.base import Sample, Split, TaskDataModule
from datamodules.images import ImageMode, check_image_mode, read_image
from datamodules.packages import check_sha256, data_package, sha256
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import LLAVA_HF, Modality
from datamodules.vlm_samples import AnsweredPrompts, ScoredPrompts, check_modality
from nscmerge.errors import ConfigError

Kind = Literal["shape", "color", "yes_no"]
REQUIREMENT = "easy-vqa==1.0"
SHA256 = "4a9b45550da0d1fc338d72d2437d12b3f5da3756b4cc98eed45e85b77186daa6"
#: Training pictures whose questions are kept for validation.
VAL_PICTURES = 400

#: Question, answer, number of the picture.
Question = tuple[str, str, int]


def kind_of(answer: str) -> Kind:
    """Return which kind of question has such an answer."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


class Questions:
    """Questions on pictures of one folder.

    Args:
        questions: The questions.
        folder: ``images/NUMBER.png``.
    """

    def __init__(self, questions: Sequence[Question], folder: Path) -> None:
        self.questions, self.folder = questions, folder

    def __len__(self) -> int:
        return len(self.questions)

    def name(self, index: int) -> str:
        """Return what messages call a sample."""
        return f"easy-VQA: {self.folder.name}, sample {index}"

    def ask(self, index: int, picture: bool) -> tuple[str, Any]:
        """Return the question, and the picture if it is wanted."""
        question, _, number = self.questions[index]
        return question, read_image(f"images/{number}.png", self.name(index), self.folder) if picture else None

    def answers(self, index: int) -> list[str]:
        """Return the one accepted answer."""
        return [self.questions[index][1]]


class EasyVQADataModule(TaskDataModule):
    """One kind of question: three shapes, eight colours, or yes and no, on 4,000 + 1,000 rendered pictures.

    Rendered shapes, no photographs: real data, but easy. Test is the published one; validation asks of 400 training
    pictures (by ``seed``) that training does not see. MIT licence.

    Args:
        kind: ``shape``, ``color`` or ``yes_no``.
        processor: Folder or hub id of the base model.
        train_size: Questions for training; None takes all.
        val_size: Questions of validation.
        test_size: Questions of test.
        image_mode: ``center_crop``, or ``pad`` to a square first.
        modality: What a prompt holds: ``both``, ``text`` or ``image``.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Which pictures are kept for validation, which questions are taken, the order of training.

    Raises:
        ConfigError: An option is unknown.
    """

    def __init__(
        self,
        kind: Kind,
        processor: str,
        train_size: int | None = 800,
        val_size: int | None = 200,
        test_size: int | None = 400,
        image_mode: ImageMode = "center_crop",
        modality: Modality = "both",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if kind not in get_args(Kind):
            raise ConfigError(f"easy-VQA has no questions of the kind '{kind}'; use 'shape', 'color' or 'yes_no'.")
        check_modality(modality)
        check_image_mode(image_mode)
        self.kind, self.processor, self.image_mode, self.modality = kind, processor, image_mode, modality
        self._sizes: dict[Split, int | None] = {"train": train_size, "val": val_size, "test": test_size}
        self._encoder: VLMEncoder | None = None
        self._splits: dict[Split, Questions] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the package, check its files, read the questions; once, whatever the stage."""
        if self._encoder is not None:
            return
        self._encoder = VLMEncoder.load(self.processor, LLAVA_HF, self.image_mode)
        root = data_package("easy_vqa", REQUIREMENT) / "data"
        files = [*root.glob("*/images/*.png"), *root.glob("*/questions.json")]
        check_sha256(f"easy-VQA: {root}", sha256(files, root), SHA256, f"Reinstall {REQUIREMENT}.")
        held_out = set(self._shuffled(range(4000))[:VAL_PICTURES])
        train, test = (self._read(root / split) for split in ("train", "test"))
        self._splits = {
            "train": self._some([q for q in train if q[2] not in held_out], root / "train", "train"),
            "val": self._some([q for q in train if q[2] in held_out], root / "train", "val"),
            "test": self._some(test, root / "test", "test"),
        }

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return prompts, with the one accepted answer as ``target``."""
        return ScoredPrompts(*self._opened(split), self.modality)

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return prompts with their answer, its tokens as ``target``."""
        samples, encoder = self._opened(split)
        return AnsweredPrompts(samples, [(i, 0) for i in range(len(samples))], encoder, self.modality)

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data."""
        note = f"easy-VQA ({REQUIREMENT}): rendered shapes, no photographs"
        return {"data": note, "kind": self.kind, "image_mode": self.image_mode, "modality": self.modality}

    def _opened(self, split: Split) -> tuple[Questions, VLMEncoder]:
        if self._encoder is None:
            raise ConfigError(f"easy-VQA: the '{split}' split is not read yet; call setup() first.")
        return self._splits[split], self._encoder

    def _read(self, folder: Path) -> list[Question]:
        questions = json.loads((folder / "questions.json").read_text("utf-8"))
        return [(text, answer, number) for text, answer, number in questions if kind_of(answer) == self.kind]

    def _some(self, questions: list[Question], folder: Path, split: Split) -> Questions:
        """Return as many as are wanted, drawn over all pictures."""
        return Questions([questions[i] for i in self._shuffled(range(len(questions)))[: self._sizes[split]]], folder)

    def _shuffled(self, numbers: range) -> list[int]:
        return torch.randperm(len(numbers), generator=torch.Generator().manual_seed(self.seed)).tolist()
