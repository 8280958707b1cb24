"""Label-free losses: one file each."""

from nscmerge.objectives.base import Objective
from nscmerge.objectives.entropy import Entropy
from nscmerge.objectives.nsc import NSC

__all__ = ["NSC", "Entropy", "Objective"]
