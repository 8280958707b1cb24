"""Four tasks of MM-MergeBench, most likely those of NUFILT: IconQA, ImageNet naming, ScienceQA, VizWiz captions.

Prompts and pictures are as in RobustMerge's evaluation (arXiv:2502.17159), on the conversation of the original LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from datamodules.base import Sample, Split, TaskDataModule
from datamodules.images import ImageMode, check_image_mode, read_image
from datamodules.llava4_records import TASKS, Record, instruction_file, read_records
from datamodules.sources import RandomSplit
from datamodules.sources.local import stand_in_note
from datamodules.tokenizer import load_pretrained
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import VICUNA, Modality
from datamodules.vlm_samples import AnsweredPrompts, ScoredPrompts, check_modality
from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError, DatasetNotFoundError

#: The 100 names that ImageNet asks to choose from, in the order of RobustMerge's evaluation.
NAMES = Path(__file__).with_name("imagenet100.txt")


def naming_text(text: str) -> str:
    """Return ImageNet's question: the first line of the record, then all names."""
    names = ", ".join(NAMES.read_text("utf-8").splitlines())
    return f"{text.splitlines()[0] if text else ''}\nChoose an answer from the choices below: {names}."


class LLaVA4DataModule(TaskDataModule):
    """One of the four tasks; test is the published evaluation file.

    Nobody publishes a validation split; ours is a tenth (seed 0) of the training records, which training then leaves
    out, or of the evaluation records, which the test then leaves out: such scores are not the published ones.

    Args:
        task: ``iconqa``, ``imagenet``, ``scienceqa`` or ``vizwiz_caption``.
        source: Folder with the task's instruction files, or the one with the folders of all tasks.
        processor: Folder or hub id of the base model in the layout of llava-hf.
        images: Folder that the paths of pictures start from; None takes ``source``.
        image_mode: None takes the task's own: ``pad`` for IconQA and captions, else ``center_crop``.
        modality: As for :class:`datamodules.vlm.VLMDataModule`.
        val_from: Which records validation is cut from.
        val_fraction: Its share of them.
        max_length: Most tokens of a sample, those of the picture included; None takes the model's context.
        batch_size: Samples per training step and process; 1 where some questions have no picture.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: Task, modality, image mode or ``val_from`` is unknown.
    """

    def __init__(
        self,
        task: str,
        source: str,
        processor: str = "llava-hf/llava-1.5-7b-hf",
        images: str | None = None,
        image_mode: ImageMode | None = None,
        modality: Modality = "both",
        val_from: Literal["train", "test"] = "train",
        val_fraction: float = 0.1,
        max_length: int | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if task not in TASKS:
            raise ConfigError(f"no task '{task}' of MM-MergeBench; known: {', '.join(TASKS)}.")
        if val_from not in ("train", "test"):
            raise ConfigError(f"val_from is '{val_from}'; use 'train' or 'test'.")
        check_modality(modality)
        self.task, self.source, self.processor, self.images = task, source, processor, images
        self.image_mode: ImageMode = image_mode or TASKS[task].image_mode
        check_image_mode(self.image_mode)
        self.modality, self.val_from, self.val_fraction = modality, val_from, val_fraction
        self.max_length = max_length
        self._encoder: VLMEncoder | None = None
        self._records: dict[str, list[Record]] = {}

    def prepare_data(self) -> None:
        """Fetch the processor, so that one process alone fills the cache."""
        load_pretrained("AutoProcessor", self.processor)

    def setup(self, stage: str | None = None) -> None:
        """Open the processor; a file of records is read when it is asked for.

        Raises:
            DatasetNotFoundError: ``source`` is no folder.
        """
        if not (folder := self._folder(self.source)).is_dir():
            raise DatasetNotFoundError(
                f"{self.task}: {folder} is no folder. Set `source` to the one with its instruction files."
            )
        if self._encoder is None:
            self._encoder = VLMEncoder.load(self.processor, VICUNA, self.image_mode, self.max_length)

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return prompts, with the list of accepted answers or references as ``target``."""
        return ScoredPrompts(self._samples(split), self._opened(split), self.modality)

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return prompts with an answer each, every caption of a picture as its own sample."""
        samples = self._samples(split)
        lessons = [(i, n) for i, record in enumerate(samples.records) for n in range(len(record.answers))]
        return AnsweredPrompts(samples, lessons, self._opened(split), self.modality)

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data."""
        own = ("task", "source", "image_mode", "modality", "val_from", "val_fraction")
        note = stand_in_note(self._folder(self.source))
        return {**{name: getattr(self, name) for name in own}, **({"data": note} if note else {})}

    @staticmethod
    def _folder(source: str) -> Path:
        return Path(resolve_source(source)).expanduser()

    def _samples(self, split: Split) -> Instructions:
        return Instructions(self._split(split), self.task, self._folder(self.images or self.source))

    def _opened(self, split: Split) -> VLMEncoder:
        if self._encoder is None:
            raise ConfigError(f"{type(self).__name__}: the '{split}' split is not open yet; call setup() first.")
        return self._encoder

    def _split(self, split: Split) -> list[Record]:
        records = self._file(self.val_from if split == "val" else split)
        if split not in ("val", self.val_from):
            return records
        rest, val = RandomSplit(self.val_fraction).indices(len(records))
        return [records[i] for i in (val if split == "val" else rest)]

    def _file(self, split: str) -> list[Record]:
        if split not in self._records:
            file = instruction_file(self._folder(self.source), self.task, split)
            self._records[split] = read_records(file, self.task)
        return self._records[split]


class Instructions:
    """Records as samples.

    Args:
        records: The records.
        task: Whose.
        images: Folder that the paths of pictures start from.
    """

    def __init__(self, records: list[Record], task: str, images: Path) -> None:
        self.records, self.task, self.images = records, task, images

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """Return what messages call a sample."""
        return self.records[index].name

    def ask(self, index: int, picture: bool) -> tuple[str, Any]:
        """Return what the user says, and the picture if there is one and it is wanted."""
        record = self.records[index]
        text = naming_text(record.text) if self.task == "imagenet" else record.text
        return text, read_image(record.image, record.name, self.images) if picture and record.image else None

    def answers(self, index: int) -> list[str]:
        """Return all accepted answers or references."""
        return self.records[index].answers
