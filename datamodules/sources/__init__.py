"""Published data sets wherever they lie: one spec per task, one resolver for disk and hub.

A data module states a :class:`DatasetSpec`; ``open_source(spec, source).split("val")`` is a :class:`Table`.
"""

from datamodules.sources.labels import LabelMap
from datamodules.sources.resolve import Source, open_source
from datamodules.sources.spec import DatasetSpec, Part, Place
from datamodules.sources.splits import Cut, RandomSplit, TrainTestSplit
from datamodules.sources.table import Table

__all__ = [
    "Cut",
    "DatasetSpec",
    "LabelMap",
    "Part",
    "Place",
    "RandomSplit",
    "Source",
    "Table",
    "TrainTestSplit",
    "open_source",
]
