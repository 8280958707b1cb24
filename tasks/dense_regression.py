"""Maps of real numbers: Taskonomy's depth, edges, keypoints, shading, segmentation and curvature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from nscmerge.errors import ConfigError
from tasks.dense import DenseTask
from tasks.metrics import L1, MSE, RMSE


class DenseRegression(DenseTask):
    """Absolute or squared error over all pixels and channels, in the scaled unit of the target.

    With the error ``l1`` the L1 counts; with ``mse`` (curvature) the RMSE, and the MSE stands beside it.

    Args:
        channels: Channels of the map.
        error: ``l1`` or ``mse``.
        masked: The target has one more channel, 1 where the sensor saw something (Euclidean and z-depth). Loss and
            score take all pixels, as the paper's do; ``L1_masked`` over valid ones is reported too.
        width: As for :class:`DenseTask`.
        depth: Likewise.
        from_constant: Start the decoder at the constant that is best on 256 training samples instead of at random; for
            maps so flat that a random start does not catch up with it.

    Raises:
        ConfigError: An unknown error, or ``masked`` without ``l1``.
    """

    higher_is_better = False

    def __init__(
        self,
        channels: int = 1,
        error: Literal["l1", "mse"] = "l1",
        masked: bool = False,
        width: int = 768,
        depth: int = 12,
        from_constant: bool = False,
    ) -> None:
        super().__init__(channels, width, depth)
        if error not in ("l1", "mse") or (masked and error != "l1"):
            raise ConfigError(f"error is '{error}' with masked {masked}; expected 'l1', or 'mse' without masked.")
        self.channels, self.error, self.masked, self.from_constant = channels, error, masked, from_constant
        self.head_samples = 256 if from_constant else 0
        self.primary = "L1" if error == "l1" else "rmse"

    def constant(self, targets: Tensor) -> Tensor:
        """Return what is best for every channel where nothing is seen: median or mean of (M, C, H, W), (C,)."""
        values = targets[:, : self.channels].transpose(0, 1).flatten(1)
        return values.median(1).values if self.error == "l1" else values.mean(1)

    @torch.no_grad()
    def fit_head(self, targets: Tensor) -> None:
        """Set the decoder to :meth:`constant` of training targets."""
        self.decoder.weight.zero_()
        assert self.decoder.bias is not None  # for the type checker
        self.decoder.bias.copy_(self.constant(targets))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean error over pixels and channels: (N, C, H, W), the target with one channel more if masked."""
        error = l1 if self.error == "l1" else nn.functional.mse_loss
        return error(prediction, target[:, : self.channels])

    def metrics(self) -> MetricCollection:
        """Return ``L1``, and ``L1_masked`` if masked; or ``rmse`` and ``mse``."""
        if self.error == "mse":
            return MetricCollection({"rmse": RMSE(), "mse": MSE()}, compute_groups=False)
        found: dict[str, Metric] = {"L1": L1(), **({"L1_masked": L1(mask_channel=True)} if self.masked else {})}
        return MetricCollection(found, compute_groups=False)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference over pixels and channels."""
    return nn.functional.l1_loss(prediction, target)
