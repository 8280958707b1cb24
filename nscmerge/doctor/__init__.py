"""Preflight of adapters before a merge: every fault by name, ranks, overlaps, and what each method would cost."""

from nscmerge.doctor.examine import Report, examine
from nscmerge.doctor.findings import KINDS, Finding

__all__ = ["KINDS", "Finding", "Report", "examine"]
