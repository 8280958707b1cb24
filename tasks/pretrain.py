"""Pre-train a small vision transformer from nothing: masked patches, and which kinds of object an image shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim import AdamW

from nscmerge.folders import check_absent, new_folder
from nscmerge.timm_model import write_timm
from tasks.dense import IGNORE
from tasks.expert import described, seed, versions
from tasks.schedule import schedule_factor

#: Where a timm folder says how its weights came about.
CARD = "pretraining.json"


class Pretrain(LightningModule):
    """Trains all weights on two objectives at once and writes a timm folder.

    Hidden patches are filled in from the rest by a decoder of one block that is thrown away (masked autoencoder,
    arXiv:2111.06377). Where a source has label maps, the class token tells which kinds of object the image shows: the
    stand-in's counterpart of classifying ImageNet-21k. No dense label is ever predicted, so every task of the suite has
    to be learned by its expert.

    Batches are ``{source: {"x": (N, 3, H, W), "target": ...}}``; see :class:`datamodules.mixed.MixedDataModule`.

    Args:
        kinds: Number of classes by source, for sources whose target is an int64 (N, H, W) label map, 255 ignored.
        architecture: Entry in timm's registry from which the model starts.
        patch_size: Pixels.
        width: Of the tokens, a multiple of 4.
        depth: Number of blocks.
        heads: Attention heads.
        image_size: Side for which position embeddings are made.
        masked: Share of patches that are hidden.
        presence: Weight of the second objective.
        lr: Peak learning rate of AdamW, betas 0.9 and 0.95.
        weight_decay: Of AdamW.
        warmup: Share of the steps.
        half: Write fp16.
        output: timm folder to write; must not exist. None writes nothing.

    Raises:
        OutputExistsError: ``output`` is there already.
    """

    def __init__(
        self,
        kinds: dict[str, int],
        architecture: str = "vit_tiny_patch16_224",
        patch_size: int = 8,
        width: int = 128,
        depth: int = 8,
        heads: int = 4,
        image_size: int = 128,
        masked: float = 0.6,
        presence: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        half: bool = True,
        output: Path | None = None,
    ) -> None:
        super().__init__()
        if output is not None:
            check_absent(output)
        self.architecture, self.image_size, self.patch_size = architecture, image_size, patch_size
        self.arguments = {
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "img_size": image_size,
            "dynamic_img_size": True,
        }
        self.model: nn.Module = timm.create_model(architecture, num_classes=0, **self.arguments)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder = Block(width, heads)
        self.pixels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch_size**2))
        # A list, as nn.ModuleDict refuses names that modules have as methods.
        self.sources, self.presence = list(kinds), nn.ModuleList(nn.Linear(width, count) for count in kinds.values())
        self.masked, self.presence_weight = masked, presence
        self.lr, self.weight_decay, self.warmup, self.half, self.output = lr, weight_decay, warmup, half, output

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with linear warm-up and decay per step."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        factor = schedule_factor("linear", int(self.trainer.estimated_stepping_batches), self.warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """Return both losses, summed over sources and divided by their number."""
        losses = []
        for source, part in batch.items():
            x = part["x"]
            grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
            seen, hidden = split_tokens(len(x), grid[0] * grid[1], self.masked, x.device)
            tokens = self.encode(x, seen)
            fill = masked_pixel_loss(self.fill_in(tokens, seen, grid), patches(x, self.patch_size), hidden)
            self.log(f"train/masked/{source}", fill, batch_size=len(x))
            losses.append(fill)
            if source in self.sources:
                logits = self.presence[self.sources.index(source)](tokens[:, 0])
                shown = nn.functional.binary_cross_entropy_with_logits(logits, present(part["target"], logits.shape[1]))
                self.log(f"train/presence/{source}", shown, batch_size=len(x))
                losses.append(self.presence_weight * shown)
        loss = torch.stack(losses).sum() / len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def encode(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the class token and those of patches ``seen``, (N, K), after the final norm: (N, 1 + K, width)."""

        def keep(module: nn.Module, args: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
            chosen = tokens[:, 1:].gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1]))
            return torch.cat([tokens[:, :1], chosen], dim=1)

        # patch_drop comes after the position embeddings, as a masked autoencoder wants it
        hook = self.model.get_submodule("patch_drop").register_forward_hook(keep)
        try:
            tokens: Tensor = self.model.forward_features(x)  # type: ignore[operator]
        finally:
            hook.remove()
        return tokens

    def fill_in(self, tokens: Tensor, seen: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return predicted pixels of all patches, (N, T, 3 size^2), from :meth:`encode`'s tokens."""
        width = tokens.shape[-1]
        whole = self.mask_token.to(tokens.dtype).expand(len(tokens), grid[0] * grid[1], width)
        whole = whole.scatter(1, seen[..., None].expand(-1, -1, width), tokens[:, 1:])
        place = build_sincos2d_pos_embed(list(grid), width, device=tokens.device, dtype=tokens.dtype)
        pixels: Tensor = self.pixels(self.decoder(whole + place))
        return pixels

    def on_train_end(self) -> None:
        """Write the timm folder and how it came about."""
        if self.output is None or not self.trainer.is_global_zero:
            return
        data = getattr(self.trainer, "datamodule", None)
        options = {key: getattr(self, key) for key in ("masked", "presence_weight", "lr", "weight_decay", "warmup")}
        card = {
            "objectives": "masked patches (masked autoencoder) and presence of object kinds, from random weights",
            "data": {name: described(source) for name, source in getattr(data, "sources", {}).items()},
            "training": {**options, "steps": self.trainer.global_step, "seed": seed()},
            "last_step": {name: float(value) for name, value in self.trainer.callback_metrics.items()},
            "versions": versions(),
        }
        size = (self.image_size, self.image_size)
        with new_folder(self.output) as partial:
            write_timm(self.model, self.architecture, self.arguments, size, partial, half=self.half)
            (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(f"base model written to {self.output}")


def split_tokens(images: int, tokens: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which patches of each image are seen, int64 (N, K), and which are hidden, bool (N, T); drawn anew.

    Every image hides round(masked T) patches, so that the rest form one tensor.
    """
    order = torch.rand(images, tokens, device=device).argsort(1)
    seen = order[:, round(masked * tokens) :]
    hidden = torch.ones(images, tokens, dtype=torch.bool, device=device).scatter(1, seen, False)
    return seen, hidden


def patches(x: Tensor, size: int) -> Tensor:
    """Return images (N, 3, H, W) cut into patches, (N, T, 3 size^2), each of mean 0 and variance 1."""
    cut = nn.functional.unfold(x, size, stride=size).transpose(1, 2)
    return (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-2).sqrt()


def masked_pixel_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean squared error over hidden patches; (N, T, P) twice and bool (N, T)."""
    error = (prediction - target).square().mean(-1)
    return (error * hidden).sum() / hidden.sum().clamp_min(1)


def present(target: Tensor, kinds: int) -> Tensor:
    """Return which labels occur in a (N, H, W) map, 255 apart, as 0 and 1, (N, kinds)."""
    found = nn.functional.one_hot(torch.where(target == IGNORE, kinds, target).flatten(1), kinds + 1)
    return found.amax(1)[:, :kinds].float()
