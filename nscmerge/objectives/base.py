"""What every label-free objective offers to the module that learns a merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nscmerge.batching import Group
from nscmerge.coefficients import KeepsPrecision
from nscmerge.factors import LowRank
from nscmerge.merged_linear import MergedModel


class Objective(KeepsPrecision):
    """A loss that needs inputs only. Subclasses choose how far the model runs and what they read from it."""

    @abstractmethod
    def prepare(self, model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Do the work that is done once: select layers, precompute what depends on the factors alone.

        Args:
            model: Base model, before the merged layers are attached.
            experts: ``{task: {layer name: LowRank}}``.
        """

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return what the receipt says of this objective, JSON-able."""

    @abstractmethod
    def losses(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: scalar loss with gradient}`` of one fused group: the mean over that task's rows."""

    @abstractmethod
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: scalar}`` as it is reported in validation: no gradient, no floor."""
