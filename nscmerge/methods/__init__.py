"""Closed-form merging methods: one file each, and the table of them.

A new method touches its file, its test and one entry of :data:`METHODS`.
"""

from __future__ import annotations

from nscmerge.methods.dense import dense_mean, dense_sum
from nscmerge.methods.kinds import Layerwise, Method, WholeModel
from nscmerge.methods.linear import linear
from nscmerge.methods.svd import svd, svd_untruncated
from nscmerge.methods.task_arithmetic import task_arithmetic
from nscmerge.methods.weight_average import weight_average

__all__ = ["METHODS", "Layerwise", "Method", "WholeModel"]

METHODS: dict[str, Method] = {
    "weight_average": Layerwise(weight_average, dense_mean),
    "task_arithmetic": Layerwise(task_arithmetic, dense_sum),
    "linear": Layerwise(linear, dense_sum, missing="error"),
    "svd": Layerwise(svd, dense_sum, papercode=svd_untruncated, exact=svd_untruncated),
}
