"""Every dense metric in two processes with uneven shares equals one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.metric_cases import share

ROOT = Path(__file__).parents[2]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.metric_cases", str(rank), "2", str(tmp_path / "store"), str(out)],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    alone = share(0, 1)
    for out in outs:
        assert json.loads(out.read_text()) == pytest.approx(alone, rel=1e-12)
