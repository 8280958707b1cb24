"""What every label-free objective offers to the module that learns a merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nscmerge.adapters import Adapter
from nscmerge.batching import Group
from nscmerge.coefficients import KeepsPrecision
from nscmerge.factors import LowRank
from nscmerge.merged_linear import MergedModel


class Objective(KeepsPrecision):
    """A loss that needs inputs only. Subclasses choose how far the model runs and what they read from it."""

    #: What :meth:`losses` and :meth:`report` measure, as logs name it: ``omega/<task>``, ``val/omega/<task>``.
    quantity: str = "omega"

    def bind(self, experts: Mapping[str, Adapter]) -> None:
        """Check the experts, and take what they hold beside factors; before the base model is loaded.

        Args:
            experts: Adapters by task. Nothing is needed of them by default.
        """

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

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the loss of one step from those of its tasks, each weighing the same: their mean (Eq. 5 of NSC)."""
        return torch.stack(list(losses)).mean()

    @abstractmethod
    def report(self, merged: MergedModel, group: Group) -> dict[str, Tensor]:
        """Return ``{task: scalar}`` as it is reported in validation: no gradient, no floor."""

    def runs_alike(self) -> bool:
        """Return whether the passes of a step depend on the batch's shape alone, so that processes stay in step."""
        return True

    def finished(self) -> str | None:
        """Return why the fit should end after this step, for the log; None to go on, as most objectives always do."""
        return None
