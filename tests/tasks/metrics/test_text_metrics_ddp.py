"""Every metric of generated text in two processes, with uneven shares and with an idle one, equals one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.text_metric_cases import in_group, share

ROOT = Path(__file__).parents[3]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    alone, part = share(0, 1)["shared"], share(0, 2)["shared"]
    assert all(part[name] != pytest.approx(value, rel=1e-6) for name, value in alone.items())  # shares do differ
    out = tmp_path / "other.json"
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.text_metric_cases", "1", "2", str(tmp_path / "store"), str(out)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        ours = in_group(0, 2, tmp_path / "store")
        _, errors = other.communicate(timeout=120)
        assert other.returncode == 0, errors
    finally:
        other.kill()
    for values in (*ours.values(), *json.loads(out.read_text()).values()):
        assert values == pytest.approx(alone, rel=1e-12)
    assert list(ours) == ["shared", "idle"]
