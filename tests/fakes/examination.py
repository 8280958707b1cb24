"""Short ways to call the doctor and to pick out what it found."""

from nscmerge.doctor import examine
from nscmerge.doctor.estimate import Speed


def look(*folders, **options):
    return examine(folders, speed=Speed(), **options)


def codes(report):
    return [(finding.severity, finding.code) for finding in report.findings]


def only(report, code):
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) == 1, codes(report)
    return found[0]
