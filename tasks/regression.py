"""Text regression."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection, PearsonCorrCoef

from nscmerge.errors import ConfigError
from tasks.metrics.rmse import RMSE
from tasks.text import TextTask


class TextRegression(TextTask):
    """Squared error on standardised targets; Pearson's r counts, the RMSE in the target's unit is reported beside it.

    The head learns (y - mean) / std; mean and std of the training targets are part of it, so that one learning rate
    suits every unit and predictions come out in the target's own.

    Args:
        hidden_size: Width of the encoder's last hidden state.
    """

    primary, higher_is_better = "pearson", True
    outputs = "values"
    mean: Tensor
    std: Tensor

    def __init__(self, hidden_size: int = 384) -> None:
        super().__init__(1, hidden_size)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def fit_head(self, targets: Tensor) -> None:
        """Take mean and standard deviation from the training targets, (N,).

        Raises:
            ConfigError: All targets are equal, or there is one only.
        """
        if len(targets) < 2 or not (std := targets.double().std()) > 0:
            raise ConfigError(
                f"{len(targets)} training targets without any spread cannot be regressed; check the data."
            )
        self.mean.copy_(targets.double().mean())
        self.std.copy_(std)

    def predict(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return predictions in the target's unit, (N,)."""
        return self.scores(features).squeeze(-1) * self.std + self.mean

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error in units of the targets' variance: 1 is as good as their mean."""
        return nn.functional.mse_loss(prediction / self.std, target.to(prediction.dtype) / self.std)

    def metrics(self) -> MetricCollection:
        """Return ``pearson`` and ``rmse``."""
        return MetricCollection({"pearson": PearsonCorrCoef(), "rmse": RMSE()}, compute_groups=False)
