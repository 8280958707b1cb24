"""Zero-shot classification of images by CLIP: the head is made of the class names by the pre-trained text tower."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError
from tasks.base import Task
from tasks.zero_shot_prompts import read_prompts

#: Texts that go through the text tower at once.
BATCH = 256


def zero_shot_head(embeddings: Tensor) -> Tensor:
    """Return one unit vector per class, (C, d): each prompt's embedding to length 1, their mean to length 1 again.

    Args:
        embeddings: (C, P, d), of P prompts per class.
    """
    unit = nn.functional.normalize(embeddings, dim=-1)
    return nn.functional.normalize(unit.mean(1), dim=-1)


def zero_shot_logits(images: Tensor, head: Tensor, scale: Tensor) -> Tensor:
    """Return exp(logit scale) times the cosines of images and classes, (N, d), (C, d), scalar -> (N, C)."""
    return scale * nn.functional.normalize(images, dim=-1) @ head.T


class ZeroShotClassification(Task):
    """Cross entropy on scaled zero-shot logits; accuracy over all samples, in [0, 1].

    Text tower, projections and scale are those of the base checkpoint and stay frozen; only the vision tower is
    adapted. The head is no part of an expert: it is made anew from ``clip`` when a model is first seen.

    Source: fusion-bench (hf_clip, the CLIP task pool); NSC, Table 14.

    Args:
        dataset: Whose class names and prompts: a key of :mod:`tasks.zero_shot_prompts`.
        clip: Folder or hub id of the whole CLIP model with tokenizer; None takes where the base model came from.

    Raises:
        ConfigError: No such data set.
    """

    primary, higher_is_better = "accuracy", True
    outputs = "classes"
    head: Tensor
    scale: Tensor
    projection: Tensor

    def __init__(self, dataset: str, clip: str | None = None) -> None:
        super().__init__()
        self.dataset, self.clip = dataset, clip
        self._prompts = read_prompts(dataset)
        self.num_classes = len(self._prompts.classes)
        # Not persistent, so that an expert's head is empty and published adapters, which have none, fit.
        for name, shape in {"head": (0, 0), "scale": (), "projection": (0, 0)}.items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def check(self, model: nn.Module) -> None:
        """Make the head.

        Raises:
            ConfigError: The model is no vision tower of CLIP, or the whole CLIP cannot be read.
        """
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "clip_vision_model":
            raise ConfigError(
                f"{type(model).__name__} is no vision tower of CLIP; load the base model with model_class "
                "CLIPVisionModelWithProjection (base_model.init_args.model_class)."
            )
        source = self.clip or getattr(config, "_name_or_path", "")
        if not source:
            raise ConfigError("where the text tower comes from is not known; set the task's clip to the whole model.")
        self._make(source)
        width = getattr(config, "projection_dim", None)
        if width != self.head.shape[1]:
            raise ConfigError(
                f"the text tower of '{source}' gives {self.head.shape[1]} features, {type(model).__name__} "
                f"{width}; set the task's clip to the model that the vision tower belongs to."
            )

    @torch.no_grad()
    def _make(self, source: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            path = resolve_source(source)
            tokenizer = AutoTokenizer.from_pretrained(path)
            clip = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"CLIP '{source}' cannot be loaded ({str(error).splitlines()[0]}). Expected the whole model with both "
                "towers and a tokenizer, in safetensors; set the task's clip to its folder or hub id."
            ) from error
        texts = [text for of_class in self._prompts.texts() for text in of_class]
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            pooled = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            parts.append(clip.text_projection(pooled.pooler_output))
        embeddings = torch.cat(parts).unflatten(0, (self.num_classes, -1))
        device = self.scale.device
        self.head = zero_shot_head(embeddings.double()).float().to(device)
        self.scale = clip.logit_scale.exp().detach().to(device)
        self.projection = clip.visual_projection.weight.detach().to(device)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the projected image embeddings, (N, d), not normalised."""
        if not len(self.head):
            self.check(model)
        output = model(**inputs)
        found = getattr(output, "image_embeds", None)
        if found is None:  # a vision tower without its projection
            pooled = output.pooler_output
            found = nn.functional.linear(pooled, self.projection.to(pooled.device, pooled.dtype))
        embeddings: Tensor = found
        return embeddings

    def reads(self) -> Hashable:
        """Return what tells the features apart: the projection comes from ``clip``."""
        return type(self).features, self.clip

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return scaled logits, (N, num_classes), in fp32, also under autocast: at scale 100 bf16 is too coarse."""
        with torch.autocast(features.device.type, enabled=False):
            return zero_shot_logits(features.float(), self.head.to(features.device), self.scale.to(features.device))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy, in nats."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> MetricCollection:
        """Return ``accuracy``: every sample counts the same, whatever its class."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})
