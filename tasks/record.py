"""What a record of results says of the experts: read from their cards, as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nscmerge.base_model import resolve_source
from tasks.expert import CARD


def training_of(source: str | Path) -> dict[str, Any]:
    """Return how an expert was made (rank, alpha, steps, seed, ...) and by which commit; empty where it has no card.

    Args:
        source: Its folder, or ``package:NAME/FOLDER``.
    """
    file = Path(resolve_source(str(source))) / CARD
    if not file.is_file():
        return {}
    card = json.loads(file.read_text(encoding="utf-8"))
    return {**card.get("training", {}), "commit": card.get("versions", {}).get("commit")}
