"""What the doctor can find: every kind by its stable code, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
#: From bad to harmless, the order in which findings are listed.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Kind(NamedTuple):
    """How bad a kind of finding is (an ``error`` cannot be merged), and what to do unless the finding knows better."""

    severity: Severity
    advice: str


_COPY = "Copy the whole adapter folder again from where it was trained."
_TRAIN = "Train this adapter as plain LoRA, or leave it out."
_SAVE = "Save the adapter again with PEFT's save_pretrained."
_SAME_BASE = "Merge only adapters of one base model; leave out those of another one."

#: Codes are for scripts and stay put. Those up to ``unmergeable`` are also the codes of :class:`AdapterError`.
KINDS: dict[str, Kind] = {
    # one adapter: its files
    "not-found": Kind("error", "Check the path or the hub id."),
    "config-missing": Kind("error", "Give the folder that PEFT's save_pretrained wrote."),
    "config-damaged": Kind("error", _COPY),
    "config-value": Kind("error", "Correct adapter_config.json, or save the adapter again with PEFT."),
    "weights-missing": Kind("error", _COPY),
    "weights-damaged": Kind("error", _COPY),
    "pickle-only": Kind("error", "Rewrite it with 'nscmerge convert', which opens the pickle as tensors only."),
    "index-damaged": Kind("error", _COPY),
    "shard-missing": Kind("error", _COPY),
    "double-key": Kind("error", _SAVE),
    "two-heads": Kind("error", "Delete the wrong one of the two heads."),
    # one adapter: what it is
    "not-lora": Kind("error", _TRAIN),
    "dora": Kind("error", _TRAIN),
    "changed-base": Kind("error", "Convert it to plain LoRA with PEFT, which needs the adapter's untrained start."),
    "unsupported-lora": Kind("error", _TRAIN),
    "unknown-key": Kind("error", _SAVE),
    "no-lora-tensor": Kind("error", _SAVE),
    "missing-half": Kind("error", _COPY),
    "flat-factor": Kind("error", "Save it again with the sharded parameters gathered."),
    "rank-conflict": Kind("error", "Put config and weights of the same training run together."),
    "dtype": Kind("error", "Convert the tensors to fp16, bf16 or fp32."),
    "not-finite": Kind("error", "That training run diverged; take an earlier checkpoint."),
    "zero-update": Kind("error", "It was never trained, or not gathered when saved. Leave it out or save it again."),
    "unmergeable": Kind("error", _TRAIN),
    # all adapters together
    "same-name": Kind("error", "Give each a name of its own: NAME=FOLDER."),
    "listed-twice": Kind("error", "List it once; to weigh it more, scale its alpha."),
    "base-mismatch": Kind("error", _SAME_BASE + " If these are two names of the same weights, give --base."),
    "base-names-differ": Kind("warning", "Make sure that all names mean the same weights: shapes cannot tell."),
    "base-unknown": Kind("note", "Make sure that it was trained on the base model of the others."),
    "width-mismatch": Kind("error", _SAME_BASE),
    "kind-mismatch": Kind("error", _SAME_BASE),
    "vocabulary-mismatch": Kind("error", "Train on one vocabulary size, or leave out the resized embedding and head."),
    "no-shared-layer": Kind("error", "Load and save all with the same model class, so that layers have equal names."),
    "missing-layers": Kind("warning", "Nothing to do if intended."),
    "single-adapter": Kind("note", "A merge of one adapter is that adapter, scaled."),
    "duplicate-file": Kind("warning", "Leave one out, unless its task shall count twice."),
    "duplicate-update": Kind("warning", "Leave one out, unless its task shall count twice."),
    "parallel-updates": Kind("warning", "Check that these are two tasks, not two checkpoints or scalings of one."),
    "near-zero-update": Kind("warning", "Check that it was trained and saved with the right alpha; it hardly counts."),
    "norm-outlier": Kind("warning", "Check its alpha and learning rate; one scale for all will not suit it."),
    "scaling-outlier": Kind("warning", "Check its lora_alpha, r and use_rslora: alpha / r is applied exactly once."),
    "negative-scaling": Kind("warning", "Negate its B and its alpha, which is the same update."),
    "zero-layers": Kind("note", "Nothing to do if these layers were frozen."),
    "rank-deficient": Kind("note", "Nothing to do: ranks beyond the numerical one carry nothing."),
    "unequal-ranks": Kind("note", "Use another method, or truncate all to one rank first."),
    "mixed-dtypes": Kind("note", "Nothing to do: factors are widened to fp32, their rounding errors stay."),
    "task-head": Kind("note", "Nothing to do: heads are never merged, every task keeps its own."),
    "whole-tensors": Kind("note", "Give the base model (--base) to merge, or they keep the base model's values."),
    "dense-deltas": Kind("note", "Nothing to do; dense deltas are not compared here."),
    # against the base model
    "base-unreadable": Kind("error", "Give the folder of the base model: config.json and safetensors files."),
    "base-quantised": Kind("note", "Give the unquantised base model to have the widths compared."),
    "base-width-mismatch": Kind("error", _SAME_BASE),
    "layers-not-in-base": Kind("warning", "Check that this is the base model, under the adapter's model class."),
}


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Args:
        code: A key of :data:`KINDS`.
        found: What was got and what was expected.
        adapters: Whom it concerns, by name.
        layers: Which layers or tensors, by name.
        remedy: What to do; None for the advice of its kind.
    """

    code: str
    found: str
    adapters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    remedy: str | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.code].severity

    @property
    def advice(self) -> str:
        """What to do."""
        return self.remedy or KINDS[self.code].advice

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON holds it."""
        return {
            "severity": self.severity,
            "code": self.code,
            "adapters": list(self.adapters),
            "layers": list(self.layers),
            "found": self.found,
            "advice": self.advice,
        }


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings from errors to notes, otherwise in the order in which they were made."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def some(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, quoted, and how many more there are: ``'a', 'b' and 5 more``."""
    quoted = [f"'{name}'" for name in names]
    rest = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + rest
