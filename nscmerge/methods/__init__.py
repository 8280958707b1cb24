"""Closed-form merging methods: one file each, and the table of them.

A new method touches its file, its test and one entry of :data:`METHODS`.
"""

from __future__ import annotations

from nscmerge.methods.dare_ties import dare_ties, dare_ties_papercode
from nscmerge.methods.dense import dense_mean, dense_sum
from nscmerge.methods.emr import emr, emr_elected
from nscmerge.methods.free_merging import free_merging, free_merging_low_pass
from nscmerge.methods.kinds import Layerwise, Method, WholeModel
from nscmerge.methods.knots_dare_ties import knots_dare_ties, knots_dare_ties_papercode
from nscmerge.methods.knots_ties import knots_ties, knots_ties_papercode
from nscmerge.methods.linear import linear
from nscmerge.methods.lora_lego import lora_lego
from nscmerge.methods.robust_merge import robust_merge, robust_merge_per_task
from nscmerge.methods.svd import svd, svd_untruncated
from nscmerge.methods.task_arithmetic import task_arithmetic
from nscmerge.methods.ties import ties, ties_papercode
from nscmerge.methods.weight_average import weight_average

__all__ = ["METHODS", "Layerwise", "Method", "WholeModel"]

METHODS: dict[str, Method] = {
    "weight_average": Layerwise(weight_average, dense_mean),
    "task_arithmetic": Layerwise(task_arithmetic, dense_sum),
    "linear": Layerwise(linear, dense_sum, missing="error"),
    "svd": Layerwise(svd, dense_sum, papercode=svd_untruncated, exact=svd_untruncated),
    "lora_lego": WholeModel(lora_lego, missing="error"),
    "emr": WholeModel(emr, papercode=emr_elected),
    "free_merging": WholeModel(free_merging, papercode=free_merging_low_pass),
    "robust_merge": Layerwise(robust_merge, dense_mean, papercode=robust_merge_per_task, missing="error"),
    "ties": WholeModel(ties, papercode=ties_papercode),
    "dare_ties": WholeModel(dare_ties, papercode=dare_ties_papercode),
    "knots_ties": WholeModel(knots_ties, papercode=knots_ties_papercode),
    "knots_dare_ties": WholeModel(knots_dare_ties, papercode=knots_dare_ties_papercode),
}
