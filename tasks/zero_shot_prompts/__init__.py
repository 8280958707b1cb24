"""Class names and prompts of the 20 image classification sets of fusion-bench, in its order and spelling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nscmerge.errors import ConfigError
from nscmerge.naming import unknown


@dataclass(frozen=True)
class ZeroShotPrompts:
    """How the classes of a data set are put into words.

    Attributes:
        classes: Name of every class, by label.
        prompts: Texts with the place ``{c}`` for a name.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]

    def texts(self) -> list[list[str]]:
        """Return the prompts of every class with its name put in, (classes, prompts)."""
        return [[prompt.replace("{c}", name) for prompt in self.prompts] for name in self.classes]


def read_prompts(dataset: str) -> ZeroShotPrompts:
    """Return class names and prompts of one data set.

    Args:
        dataset: Key of fusion-bench, such as ``sun397``, ``stanford-cars`` or ``oxford-iiit-pet``.

    Raises:
        ConfigError: There is no such data set.
    """
    known = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))["datasets"]
    if dataset not in known:
        raise ConfigError(unknown("zero-shot data set", dataset, known))
    return ZeroShotPrompts(tuple(known[dataset]["classes"]), tuple(known[dataset]["prompts"]))
