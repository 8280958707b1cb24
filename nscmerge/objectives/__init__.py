"""Label-free losses: one file each."""

from nscmerge.objectives.anchored import AnchoredNSC
from nscmerge.objectives.base import Objective
from nscmerge.objectives.entropy import Entropy
from nscmerge.objectives.nsc import NSC

__all__ = ["NSC", "AnchoredNSC", "Entropy", "Objective"]
