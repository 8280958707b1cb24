"""The six vision-language tasks of NSC: VizWiz, IconQA, ChartQA, DocVQA, COCO and Flickr30k captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.base import Sample, Split
from datamodules.images import ImageMode, check_image_mode, image_root, read_image
from datamodules.sources import Source, Table
from datamodules.sources.module import SourceDataModule
from datamodules.tokenizer import load_pretrained
from datamodules.vlm_encoding import VLMEncoder
from datamodules.vlm_prompts import CAPTIONING, LLAVA_HF, Modality, Style, user_text
from datamodules.vlm_samples import AnsweredPrompts, ScoredPrompts, check_modality
from datamodules.vlm_sources import SPECS, answers_of, captions, groups, one_picture, question_of
from nscmerge.errors import ConfigError


class VLMSplit:
    """One split of one task: its rows, joined by picture where they are captions.

    Args:
        task: Key of :data:`datamodules.vlm_sources.SPECS`.
        table: The rows.
        style: Whose words.
        root: Folder of relative paths of pictures.
    """

    def __init__(self, task: str, table: Table, style: Style, root: Path | None) -> None:
        self.task, self.style, self.root = task, style, root
        self.table = table.undecoded("image")
        self.groups = groups(task, table)
        self._words = table.only(*(name for name in table.columns if name != "image"))
        self._ids = table.column("id") if "id" in table else None

    def __len__(self) -> int:
        return len(self.groups)

    def name(self, index: int) -> str:
        """Return what messages call a sample."""
        identity = "" if self._ids is None else f" ({self._ids[self.groups[index][0]]})"
        return f"{self.table.where}, sample {index}{identity}"

    def ask(self, index: int, picture: bool) -> tuple[str, Any]:
        """Return what the user says, and the picture if it is wanted; reads no answer."""
        first, name = self.groups[index][0], self.name(index)
        text = question_of(self.task, self._words[first], self.style, name)
        return text, read_image(self.table[first]["image"], name, self.root) if picture else None

    def answers(self, index: int) -> list[str]:
        """Return all accepted answers or references."""
        rows = [self._words[i] for i in self.groups[index]]
        return answers_of(self.task, rows, self.style, self.name(index))

    def lessons(self) -> list[tuple[int, int]]:
        """Return (sample, number of the answer) of all that training learns: first answers, captions one by one."""
        if self.task not in CAPTIONING:
            return [(i, 0) for i in range(len(self))]
        counts = [len(captions(value, self.table.where)) for value in self.table.column("captions")]
        return [(i, n) for i, group in enumerate(self.groups) for n in range(sum(counts[r] for r in group))]


class VLMDataModule(SourceDataModule):
    """One vision-language task in the protocol of NSC (arXiv:2603.26317), whose splits its code makes.

    ``dataset`` gives prompts with the accepted answers, ``supervised`` prompts with the answer to learn: VizWiz,
    ChartQA and DocVQA the first, captions every one as its own sample.

    Args:
        task: ``vizwiz``, ``iconqa``, ``chartqa``, ``docvqa``, ``coco`` or ``flickr30k``.
        processor: Folder or hub id of the base model, whose tokenizer and image processor are used.
        source: Folder or hub id of the data; None takes the published ones. IconQA as the official code prepares it is
            not published: give a folder with train and val.
        prompt_style: ``code``, ``paper`` or ``lmms_eval``; the last asks IconQA for letters.
        image_mode: ``center_crop``, or ``pad`` to a square first.
        modality: What a prompt holds: ``both``, ``text`` without the picture, ``image`` without the text. For learning
            a merge (Table 9 of NSC); leave it alone where experts and merges are scored.
        max_length: Most tokens of a sample, those of the picture included; None takes the model's context.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.

    Raises:
        ConfigError: Task, style, modality or image mode is unknown.
    """

    def __init__(
        self,
        task: str,
        processor: str = "llava-hf/llava-1.5-7b-hf",
        source: str | None = None,
        prompt_style: Style = "code",
        image_mode: ImageMode = "center_crop",
        modality: Modality = "both",
        max_length: int | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in SPECS:
            raise ConfigError(f"no vision-language task '{task}'; known: {', '.join(SPECS)}.")
        super().__init__(SPECS[task], source, batch_size, eval_batch_size, num_workers, seed)
        user_text(task, prompt_style)
        check_modality(modality)
        check_image_mode(image_mode)
        self.task, self.processor = task, processor
        self.prompt_style, self.image_mode = prompt_style, image_mode
        self.modality, self.max_length = modality, max_length
        self._encoder: VLMEncoder | None = None
        self._splits: dict[Split, VLMSplit] = {}

    def prepare_data(self) -> None:
        """Fetch data and processor, so that one process alone fills the cache."""
        super().prepare_data()
        load_pretrained("AutoProcessor", self.processor)

    def setup(self, stage: str | None = None) -> None:
        """Open the data and the processor; a split is read when it is asked for."""
        super().setup(stage)
        if self._encoder is None:
            self._encoder = VLMEncoder.load(self.processor, LLAVA_HF, self.image_mode, self.max_length)

    def read(self, opened: Source, split: Split) -> Dataset[Sample]:
        """Return prompts, with the list of accepted answers or references as ``target``."""
        return ScoredPrompts(self._rows(opened, split), self._encoder, self.modality)

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return prompts with an answer each, its tokens and end token as ``target``.

        Raises:
            ConfigError: Called before :meth:`setup`.
        """
        if self._opened is None or self._encoder is None:
            raise ConfigError(f"{self.spec.name}: the '{split}' split is not open yet; call setup() first.")
        rows = self._rows(self._opened, split)
        return AnsweredPrompts(rows, rows.lessons(), self._encoder, self.modality)

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data."""
        own = {name: getattr(self, name) for name in ("task", "prompt_style", "image_mode", "modality")}
        return {**super().describe(), **own}

    def _rows(self, opened: Source, split: Split) -> VLMSplit:
        if split not in self._splits:
            table = opened.split(split, one_picture if self.task == "iconqa" else None)
            self._splits[split] = VLMSplit(self.task, table, self.prompt_style, image_root(opened))
        return self._splits[split]
