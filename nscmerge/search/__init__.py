"""Choose the scale of closed-form merges: by labels, as the papers do, or without."""

from nscmerge.search.criterion import Criterion, TaskValues
from nscmerge.search.grid import Grid
from nscmerge.search.ratio import NullSpaceRatio, Reading
from nscmerge.search.scale import ScaleSearch

__all__ = ["Criterion", "Grid", "NullSpaceRatio", "Reading", "ScaleSearch", "TaskValues"]
