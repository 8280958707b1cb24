"""Data sets on the hub, and why they could not be had, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datamodules.sources.local import cause
from datamodules.sources.spec import Place


def load_place(place: Place) -> Mapping[str, Any]:
    """Return ``{published split: datasets.Dataset}`` of one copy on the hub, from the cache where it is there.

    Code of the repository is never run.

    Raises:
        Exception: Whatever `datasets` and the hub raise; :func:`reason` puts it into words.
    """
    from datasets import load_dataset

    loaded: Mapping[str, Any] = load_dataset(place.id, place.config, revision=place.revision)
    return loaded


def reason(error: BaseException) -> str:
    """Return in one line why something on the hub could not be had, and what to do about it."""
    kinds, said = _kinds(error), " ".join(str(link) for link in _chain(error))
    if "GatedRepoError" in kinds or "is a gated dataset" in said:
        return "it is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
    if _offline() and kinds & {*_UNREACHABLE, "OfflineModeIsEnabled"}:
        return "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    if kinds & _UNREACHABLE:
        return f"the hub cannot be reached ({cause(error)})"
    if "scripts are no longer supported" in said:
        return "it is a loading script, which `datasets` no longer runs"
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        return "it is not there, or is private and needs a login with `hf auth login` or HF_TOKEN"
    return cause(error)


def unreachable(error: BaseException) -> bool:
    """Whether the network failed, so that asking for another copy would only wait as long again."""
    return not _offline() and bool(_kinds(error) & _UNREACHABLE)


_UNREACHABLE = frozenset({"ConnectionError", "LocalEntryNotFoundError", "TransportError", "TimeoutError"})


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _kinds(error: BaseException) -> set[str]:
    """Names of all classes of an error and its causes: the libraries that define them are not all installed."""
    return {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
