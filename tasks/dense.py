"""Dense prediction: tokens of four depths of a vision transformer, one 1x1 convolution, bilinear upsampling."""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from nscmerge.errors import ConfigError, ShapeError
from tasks.base import Task

#: Label of pixels that count nowhere, in integer and in float maps.
IGNORE = 255


class DenseTask(Task, ABC):
    """A decoder on tokens after blocks depth/4, depth/2, 3 depth/4 and after the final norm, without the class token.

    The four are concatenated to 4 x width channels; one 1x1 convolution maps them to the outputs, which are upsampled
    to the image (bilinear, ``align_corners`` false). The decoder is trained with the adapter and never merged.

    Source: the paper says "lightweight decoder"; this is the one of sel-update-mtl (spec section 2).

    Args:
        channels: Output channels.
        width: Width of the vision transformer.
        depth: Number of its blocks, a multiple of 4.

    Raises:
        ConfigError: ``depth`` is no multiple of 4.
    """

    outputs = "values"

    def __init__(self, channels: int, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        if depth < 4 or depth % 4:
            raise ConfigError(f"depth is {depth}; the decoder reads at every quarter, so it must be a multiple of 4.")
        self.width, self.depth = width, depth
        self.decoder = nn.Conv2d(4 * width, channels, kernel_size=1)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the tokens of the four depths as a map, (N, 4 width, H / patch, W / patch).

        Raises:
            ConfigError: As :meth:`check`.
            ShapeError: The image's sides are no multiples of the patch.
        """
        self.check(model)
        x = inputs["x"]
        rows, columns = _grid(model, x)
        quarters = [self.depth * quarter // 4 - 1 for quarter in (1, 2, 3)]
        last, between = model.forward_intermediates(x, indices=quarters, output_fmt="NLC")  # type: ignore[operator]
        tokens = torch.cat([*between, last[:, -rows * columns :]], dim=-1)  # (N, rows columns, 4 width)
        return tokens.transpose(1, 2).unflatten(-1, (rows, columns))

    def check(self, model: nn.Module) -> None:
        """Raise unless the head fits the model.

        Raises:
            ConfigError: The model has another width or depth than the task says.
        """
        got = getattr(model, "embed_dim", None), len(getattr(model, "blocks", ()))
        if got != (self.width, self.depth):
            raise ConfigError(
                f"{type(self).__name__} expects a vision transformer of width {self.width} and depth {self.depth}; "
                f"{type(model).__name__} has width {got[0]} and depth {got[1]}. Set width and depth of the task to the "
                "base model's."
            )

    def reads(self) -> Hashable:
        """Return what sets the features apart: where they are read, whatever the decoder makes of them."""
        return DenseTask.features, self.width, self.depth

    def decode(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the decoder's output at the size of the image, (N, channels, H, W), in the decoder's dtype."""
        out: Tensor = self.decoder(features.to(self.decoder.weight.dtype))
        return nn.functional.interpolate(out, size=inputs["x"].shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the decoder's output, (N, channels, H, W)."""
        return self.decode(features, inputs)


def _grid(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return rows and columns of the token grid of images, (N, 3, H, W)."""
    patch = model.patch_embed.patch_size  # type: ignore[union-attr]
    if any(side % p for side, p in zip(x.shape[-2:], patch, strict=True)):
        raise ShapeError(
            f"images of {tuple(x.shape[-2:])} pixels do not divide into patches of {tuple(patch)}; set the data's size "
            "to a multiple."
        )
    return x.shape[-2] // patch[0], x.shape[-1] // patch[1]


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``valid``, both of one shape; 0, with a gradient of 0, where nothing is."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)
