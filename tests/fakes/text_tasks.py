"""Tiny text tasks: a random BERT of two layers, samples of made-up tokens, and data modules over them."""

import torch
from torch import nn
from torch.utils.data import Dataset

from datamodules.base import Sample, Split, TaskDataModule

VOCABULARY, WIDTH = 50, 32


def tiny_bert(seed: int = 0) -> nn.Module:
    """Return a frozen random BertModel, 2 layers of width 32, in eval mode."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config).eval().requires_grad_(False)


class Tokens(Dataset[Sample]):
    """Samples of 3 to 9 random tokens; the label is how often low tokens occur, as a number or as one of 2 classes."""

    def __init__(self, size: int, seed: int, classes: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 10, (size,), generator=generator).tolist()
        self.ids = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
        share = torch.stack([(ids < VOCABULARY // 2).float().mean() for ids in self.ids])
        self.targets = (share > 0.5).long() if classes else 3 * share

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "target": self.targets[index]}


class FakeTextDataModule(TaskDataModule):
    """Train, val and test of different :class:`Tokens`."""

    def __init__(self, classes: bool = False, size: int = 24, seed: int = 0, batch_size: int = 8) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=5, seed=seed)
        self.sets = {s: Tokens(size, 10 * seed + i, classes) for i, s in enumerate(("train", "val", "test"))}

    def dataset(self, split: Split) -> Dataset[Sample]:
        return self.sets[split]
