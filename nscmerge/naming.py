"""The nearest known name for a misspelt one, as messages put it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean '...'?`` for the most similar known name, or nothing if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the nearest one, then all, sorted; ``no method 'tie'; did you ...``."""
    known = sorted(known)
    listed = ", ".join(known) if known else "none"
    return f"no {what} '{name}'{nearest(name, known) or ';'} Known: {listed}."
