"""Console commands of the dense studies, one after the other, each once: what is finished is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments"
TIMES = "seconds.json"


class Runs:
    """Runs commands into sub-folders of one folder, and keeps how long each took.

    Args:
        output: Folder of everything.
    """

    def __init__(self, output: Path) -> None:
        self.output = output

    def once(self, command: str, configs: Sequence[str], target: str, *words: object) -> Path:
        """Run ``nscmerge COMMAND`` unless its output folder is there, which appears only when it is whole.

        Args:
            command: ``fit``, ``search`` or ``test``.
            configs: Names of experiments, the later laid over the earlier.
            target: Output, relative to the folder of everything.
            words: Further words.

        Returns:
            The output folder.

        Raises:
            CalledProcessError: The command failed; what it printed says why.
        """
        folder = self.output / target
        if folder.exists():
            print(f"{command}: {folder} is there, kept", flush=True)
            return folder
        files = [word for name in configs for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
        logs = []
        if command == "fit":
            place = {"save_dir": str(self.output / "tensorboard"), "name": target.replace("/", "-"), "version": ""}
            logs = [f"--trainer.logger.init_args.{key}={value}" for key, value in place.items()]
        print(f"{command}: {folder}", flush=True)
        start = time.perf_counter()
        words = (*files, *logs, *words, f"--model.init_args.output={folder}")
        subprocess.run([sys.executable, "-m", "nscmerge", command, *map(str, words)], check=True)
        self._note(target, time.perf_counter() - start)
        return folder

    def seconds(self) -> dict[str, float]:
        """Return the seconds that every finished command took, by output."""
        file = self.output / TIMES
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _note(self, target: str, seconds: float) -> None:
        found = self.seconds() | {target: round(seconds, 1)}
        (self.output / TIMES).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def named(merges: dict[str, Path]) -> list[str]:
    """Return the words that add merge folders to a benchmark, by the names that its tables show."""
    return [f"--model.init_args.merges.{name}={folder}" for name, folder in merges.items()]
