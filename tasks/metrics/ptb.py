"""Penn Treebank tokens of captions: the original in Java where it is at hand, else an approximation that says so."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nscmerge.errors import ConfigError, DataError
from tasks.metrics.ptb_simple import PUNCTUATION, ptb_simple

#: What a user asks for.
Backend = Literal["auto", "java", "simple"]
_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


def choose_ptb(ptb: Backend) -> Literal["java", "simple"]:
    """Return which tokenizer splits captions: ``auto`` takes Java's where package and runtime are there.

    Args:
        ptb: ``java`` is the tokenizer of the published scores; ``simple`` an approximation without Java.

    Raises:
        ConfigError: Java's is asked for and the extra ``captions`` or a ``java`` program is missing, or another word.
    """
    if ptb not in ("auto", "java", "simple"):
        raise ConfigError(f"no tokenizer '{ptb}' for captions; expected auto, java or simple.")
    if ptb == "simple":
        return "simple"
    missing = missing_java()
    if missing and ptb == "java":
        raise ConfigError(f"the Java tokenizer of captions cannot run: {missing}. Or choose ptb='simple'.")
    return "simple" if missing else "java"


def missing_java() -> str | None:
    """Return what keeps pycocoevalcap's Java programs from running and how to mend it, None if nothing does."""
    if not (folder := caption_package()):
        return "the package pycocoevalcap is not installed; install nscmerge[captions]"
    if not (folder / _JAR).is_file():
        return f"pycocoevalcap has no {_JAR}; install version 1.2 or later"
    if not shutil.which("java"):
        return "no program 'java' is on the path; install a Java runtime, version 8 or later"
    return None


def caption_package() -> Path | None:
    """Return the folder of pycocoevalcap, None if it is not installed; nothing is imported."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def ptb_note(ptb: Backend) -> list[str]:
    """Return what a record of caption scores must say of the tokenizer: nothing if it is the original."""
    if choose_ptb(ptb) == "java":
        return []
    why = "as asked" if ptb == "simple" else missing_java()
    return [f"captions were split by the tokenizer 'simple', an approximation of the published one ({why})"]


def ptb_tokenize(captions: Sequence[str], backend: Literal["java", "simple"]) -> list[str]:
    """Return captions in lower-case PTB tokens, a blank between two, punctuation left out.

    Args:
        captions: Any texts; line breaks count as blanks. An empty one stays empty.
        backend: As :func:`choose_ptb` returns it.

    Raises:
        DataError: The Java program failed.
    """
    lines = [" ".join(caption.splitlines()) for caption in captions]
    return [ptb_simple(line) for line in lines] if backend == "simple" else ptb_java(lines)


def ptb_java(lines: Sequence[str]) -> list[str]:
    """Return lines in tokens by Stanford's tokenizer 3.4.1, all in one call; texts go through pipes, not files.

    Raises:
        DataError: The program failed, or gave other than one line each.
    """
    if not lines:
        return []
    jar = (caption_package() or Path()) / _JAR
    java = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command = [*java, "-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    # The original reads a file without a line break at its end; with one, its output has one line each.
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    found = done.stdout.decode(errors="replace").removesuffix("\n").split("\n")
    if done.returncode or len(found) != len(lines):
        raise DataError(
            f"the Java tokenizer gave {len(found)} lines for {len(lines)} captions (exit status {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-500:]}"
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION) for line in found]
