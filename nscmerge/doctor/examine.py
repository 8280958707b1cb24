"""The examination from end to end: read each adapter as far as it goes, compare what can be compared, report."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nscmerge.aligned import aligned
from nscmerge.doctor.base import BaseFacts, compare, read_facts
from nscmerge.doctor.checks import (
    check_alone,
    check_bases,
    check_layers,
    check_list,
    check_shapes,
    check_whole,
    dtypes_of,
)
from nscmerge.doctor.estimate import Estimate, Speed, estimate
from nscmerge.doctor.findings import Finding, ordered, some
from nscmerge.doctor.intake import Candidate, labels, read
from nscmerge.doctor.overlap import Survey, survey
from nscmerge.doctor.sizes import check_duplicates, check_sizes
from nscmerge.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Report:
    """What was found.

    Args:
        candidates: The adapters as listed, each with a label of its own.
        findings: From errors to notes.
        survey: Norms, numerical ranks and overlaps of those that could be read.
        estimates: What each method would cost on these; empty if none could be read.
        speed: The machine's speed that the estimates rest on.
        base: What is known of the base model, None if none was given or it could not be read.
    """

    candidates: Sequence[Candidate]
    findings: Sequence[Finding]
    survey: Survey
    estimates: Sequence[Estimate]
    speed: Speed
    base: BaseFacts | None = None

    @property
    def ok(self) -> bool:
        """True if there is no error: some method can merge these adapters."""
        return all(finding.severity != "error" for finding in self.findings)

    def facts(self) -> list[dict[str, Any]]:
        """Return one dictionary per adapter: what it is, in numbers; None where it could not be read."""
        return [_facts(candidate, self.survey) for candidate in self.candidates]

    def ranks(self) -> dict[str, dict[str, tuple[int, int | None]]]:
        """Return ``{layer: {adapter: (stored, numerical rank)}}``, None for a product that overflows."""
        table: dict[str, dict[str, tuple[int, int | None]]] = {}
        for c in self.candidates:
            for layer, factors in c.adapter.layers.items() if c.adapter else ():
                table.setdefault(layer, {})[c.name] = (factors.rank, self.survey.ranks[c.name].get(layer))
        # Numbers as numbers: layer 2 before layer 10.
        return dict(sorted(table.items(), key=lambda item: natural(item[0])))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it; ``format`` counts up if a key changes its meaning."""
        return {
            "format": 1,
            "ok": self.ok,
            "findings": [finding.as_dict() for finding in self.findings],
            "adapters": self.facts(),
            "ranks": {
                layer: {name: {"stored": s, "numerical": n} for name, (s, n) in row.items()}
                for layer, row in self.ranks().items()
            },
            "overlaps": [{"adapters": list(pair), **asdict(o)} for pair, o in self.survey.overlaps.items()],
            "estimates": [asdict(e) for e in self.estimates],
            "speed": asdict(self.speed),
            "base": None if self.base is None else {"source": self.base.source, "vocabulary": self.base.vocabulary},
        }


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which names sort with their numbers as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def examine(
    adapters: Sequence[str | Path],
    names: Sequence[str | None] | None = None,
    *,
    base: str | None = None,
    speed: Speed | None = None,
) -> Report:
    """Return everything that can be found in some adapters without a base model's weights; their faults do not raise.

    Args:
        adapters: Folders or hub ids.
        names: A name for each, None where the folder's own name will do.
        base: Folder, safetensors file or hub id of the base model, whose config and headers the adapters must fit.
        speed: What to base the estimates on; measured if None.

    Raises:
        ConfigError: The numbers of adapters and names differ.
    """
    sources = [str(adapter) for adapter in adapters]
    names = [None] * len(sources) if names is None else names
    if len(names) != len(sources):
        raise ConfigError(f"{len(names)} names for {len(sources)} adapters; give one (or None) for each.")
    candidates = [read(source, label) for source, label in zip(sources, labels(names, sources), strict=True)]
    # As a merge sees them: one name for a layer that wrappings of the base spell differently.
    readable = aligned({c.name: c.adapter for c in candidates if c.adapter is not None})
    candidates = [replace(c, adapter=readable.get(c.name)) for c in candidates]
    found = survey(readable)
    facts, findings = None, [finding for c in candidates for finding in c.faults]
    if base is not None:
        try:
            facts = read_facts(base)
        except ConfigError as error:
            findings.append(Finding("base-unreadable", str(error)))
    findings += check_list(candidates)
    findings += _same_names(names, candidates)
    findings += check_bases(candidates, base)
    findings += check_shapes(candidates)
    findings += check_layers(candidates)
    findings += (finding for c in candidates for finding in check_alone(c, found))
    findings += check_whole(candidates)
    findings += check_sizes(candidates, found)
    findings += check_duplicates(candidates, found)
    if facts is not None:
        findings += compare(candidates, facts)
    speed = speed or Speed.measure()
    return Report(candidates, ordered(findings), found, estimate(list(readable.values()), speed), speed, facts)


def _same_names(names: Sequence[str | None], candidates: Sequence[Candidate]) -> Iterator[Finding]:
    """Yield names that several adapters have, given or by their folders; one listed twice is told elsewhere."""
    groups: dict[str, list[Candidate]] = {}
    for name, c in zip(names, candidates, strict=True):
        groups.setdefault(name or os.path.basename(os.path.abspath(c.source)), []).append(c)
    for name, group in groups.items():
        if len(group) > 1 and len({c.folder and c.folder.resolve() for c in group}) > 1:
            sources = some(c.source for c in group)
            yield Finding(
                "same-name", f"{len(group)} adapters are called '{name}': {sources}.", tuple(c.name for c in group)
            )


def _facts(candidate: Candidate, found: Survey) -> dict[str, Any]:
    adapter = candidate.adapter
    facts: dict[str, Any] = {"name": candidate.name, "source": candidate.source, "bytes": candidate.size}
    if adapter is None:
        unknown = ("base_model", "layers", "ranks", "scalings", "dtypes", "parameters", "norm", "sha256")
        return facts | dict.fromkeys(unknown)
    layers = adapter.layers.values()
    norm = found.norm(candidate.name)
    return facts | {
        "base_model": adapter.base_model,
        "layers": len(adapter.layers),
        "ranks": sorted({factors.rank for factors in layers}),
        "scalings": sorted({factors.scaling for factors in layers}),
        "dtypes": dtypes_of(adapter),
        "parameters": sum(factors.A.numel() + factors.B.numel() for factors in layers),
        "whole_tensors": len(adapter.saved) + len(adapter.dense),
        "head_tensors": len(adapter.head),
        "norm": norm if math.isfinite(norm) else None,
        "sha256": adapter.sha256,
    }
