"""Tokenizers and processors from a folder or the hub, with words for what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.sources.hub import reason
from datamodules.sources.resolve import is_path
from nscmerge.base_model import resolve_source
from nscmerge.errors import ConfigError, DatasetNotFoundError

#: Above this a tokenizer's own limit is a placeholder, not a length.
_NO_LIMIT = 10**9


def load_pretrained(kind: str, source: str) -> Any:
    """Return ``transformers.<kind>.from_pretrained(source)``; code of a repository is never run.

    Args:
        kind: A class of transformers, such as ``AutoTokenizer`` or ``AutoProcessor``.
        source: As :func:`nscmerge.base_model.resolve_source` reads it.

    Raises:
        DatasetNotFoundError: There is no such folder, or the hub does not give it; says why.
    """
    import transformers

    place = resolve_source(source)
    if is_path(place) and not Path(place).expanduser().is_dir():
        raise DatasetNotFoundError(f"{kind}: {place} is no folder. Set it to a folder with its files, or to a hub id.")
    try:
        return getattr(transformers, kind).from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # any of several libraries' errors; told in our words
        raise DatasetNotFoundError(
            f"{kind} '{source}' cannot be loaded: {reason(error)}. Or give a folder with its files."
        ) from error


def load_tokenizer(source: str) -> Any:
    """Return a tokenizer that can pad: where it has no pad token, with the end token, as the papers' code does.

    Raises:
        ConfigError: It has neither.
        DatasetNotFoundError: See :func:`load_pretrained`.
    """
    tokenizer = load_pretrained("AutoTokenizer", source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"tokenizer '{source}' has neither a pad token nor an end token to pad with; add `pad_token` to its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(tokenizer: Any, wanted: int) -> int:
    """Return how many tokens a text may have: ``wanted``, or the tokenizer's own limit if that is lower."""
    limit = int(tokenizer.model_max_length)
    return min(wanted, limit) if limit < _NO_LIMIT else wanted
