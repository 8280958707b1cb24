"""Closed-form merging methods: one pure function of one layer's factors per file, and the table of them.

A new method touches its file, its test and one entry of :data:`METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from nscmerge.factors import LowRank
from nscmerge.methods.dense import dense_mean, dense_sum
from nscmerge.methods.linear import linear
from nscmerge.methods.svd import svd, svd_untruncated
from nscmerge.methods.task_arithmetic import task_arithmetic
from nscmerge.methods.weight_average import weight_average

#: (experts, *, lam, ...) -> merged layer; options are the keyword-only arguments.
LayerFunction = Callable[..., LowRank | Tensor]


@dataclass(frozen=True)
class Method:
    """One method: what it does with a layer, with a whole tensor, and with a layer that a task lacks.

    Args:
        layer: The method of its own paper and code (``variant="original"``).
        dense: Its rule for whole tensors: (deltas, *, lam) -> merged delta.
        missing: A layer that a task lacks is a ``zero`` update, or an ``error`` (methods that mix factors).
        papercode: What the NSC authors' released code does instead (``variant="papercode"``), if it differs.
        exact: What ``layer`` approximates by cutting the rank, so that the receipt can state the error.
    """

    layer: LayerFunction
    dense: Callable[..., Tensor]
    missing: Literal["zero", "error"] = "zero"
    papercode: LayerFunction | None = None
    exact: LayerFunction | None = None

    @property
    def variants(self) -> dict[str, LayerFunction]:
        """The layer function of every variant that this method has."""
        return {"original": self.layer} | ({"papercode": self.papercode} if self.papercode else {})

    def options(self, variant: str = "original") -> dict[str, Any]:
        """Return the options of a variant with their defaults: the keyword-only arguments of its function."""
        parameters = inspect.signature(self.variants[variant]).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "weight_average": Method(weight_average, dense_mean),
    "task_arithmetic": Method(task_arithmetic, dense_sum),
    "linear": Method(linear, dense_sum, missing="error"),
    "svd": Method(svd, dense_sum, papercode=svd_untruncated, exact=svd_untruncated),
}
