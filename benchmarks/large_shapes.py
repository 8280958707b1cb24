"""Bases of the papers' sizes with random weights, adapters for them, and batches: what large_base.py measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nscmerge import Adapter, LowRank

Batch = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one base model and of what a step draws.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, vocabulary: Of the language model.
        vision: hidden, intermediate, layers, heads, image size, patch size of the vision tower; None without one.
        tasks: Number of adapters.
        rank: Of every adapter.
        batch: Samples per task and step.
        shortest, longest: Text tokens of a sample, drawn evenly between the two.
        answer: Tokens of an answer at most, for the variants that generate.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: tuple[int, int, int, int, int, int] | None
    tasks: int = 6
    rank: int = 16
    batch: int = 2
    shortest: int = 32
    longest: int = 128
    answer: int = 16

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes."""
        return (self.vision[4] // self.vision[5]) ** 2 if self.vision else 0


SHAPES = {
    "llama3_8b": Shape(4096, 14336, 32, 32, 8, 128256, None),
    "llava15_7b": Shape(4096, 11008, 32, 32, 32, 32064, (1024, 4096, 24, 16, 336, 14), batch=1, longest=64),
}
_SMALL: dict[str, Any] = {
    "hidden": 64, "intermediate": 96, "heads": 4, "vocabulary": 512, "rank": 4,
    "shortest": 6, "longest": 24, "answer": 4,
}  # fmt: skip
TINY = {
    "llama3_8b": replace(SHAPES["llama3_8b"], kv_heads=2, **_SMALL),
    "llava15_7b": replace(SHAPES["llava15_7b"], kv_heads=4, vision=(32, 48, 24, 4, 56, 14), **_SMALL),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """Return the frozen base model, its random weights drawn on the device: a plain decoder, or LLaVA with its head."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if shape.vision is None:
                model: nn.Module = LlamaModel(text)
            else:
                names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
                names += ("image_size", "patch_size")
                vision = CLIPVisionConfig(**dict(zip(names, shape.vision, strict=True)), projection_dim=768)
                model = LlavaForConditionalGeneration(
                    LlavaConfig(vision_config=vision, text_config=text, image_token_index=shape.vocabulary - 1)
                )
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def experts(model: nn.Module, shape: Shape) -> dict[str, Adapter]:
    """Return random adapters on q_proj and v_proj of every language block; with LLaVA also deltas of the projector."""
    generator = torch.Generator().manual_seed(1)
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.endswith((".q_proj", ".v_proj")) and "vision" not in n
    }
    found = {}
    for k in range(shape.tasks):
        factors = {
            n: LowRank(
                torch.randn(shape.rank, m.in_features, generator=generator) / m.in_features**0.5,
                torch.randn(m.out_features, shape.rank, generator=generator) / 50,
            )
            for n, m in layers.items()
        }
        whole = {
            f"{n}.weight": torch.randn(m.weight.shape, generator=generator) / 1000
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and "multi_modal_projector" in n
        }
        found[f"task{k}"] = Adapter(factors, "random", dense=whole, name=f"task{k}")
    return found


def inputs(shape: Shape) -> Batch:
    """Return one batch ``{task: inputs}`` on the CPU; every task padded on the right to its own longest sample."""
    generator = torch.Generator().manual_seed(2)
    batch: Batch = {}
    for k in range(shape.tasks):
        lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.batch,), generator=generator)
        lengths[0] = max(int(lengths[0]), shape.longest - 4 * k)
        width = int(lengths.max())
        ids = torch.randint(3, shape.vocabulary - 1, (shape.batch, width), generator=generator)
        mask = (torch.arange(width) < lengths[:, None]).long()
        own = {"input_ids": ids * mask, "attention_mask": mask}
        if shape.vision:
            image = torch.full((shape.batch, shape.image_tokens), shape.vocabulary - 1)
            own = {
                "input_ids": torch.cat([ids[:, :5], image, ids[:, 5:] * mask[:, 5:]], 1),
                "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
            }
            side = shape.vision[4]
            own["pixel_values"] = torch.randn(shape.batch, 3, side, side, generator=generator)
        batch[f"task{k}"] = own
    return batch
