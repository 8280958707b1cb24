"""Appends that are killed, or meet a full disk: the folder is the old or the new merge, and goes on the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nscmerge import Adapter, LowRank, continual, save_adapter
from nscmerge.continual.folder import append_to, load_state, start_folder
from nscmerge.errors import OutputError
from tests.fakes.append_killed import digest, seen

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
ROOT = Path(__file__).parents[3]
#: How many random moments the slow test kills at; more for a longer look.
KILLS = int(os.environ.get("NSCMERGE_KILLS", "12"))


def expert(seed, folder, layers=1, d=12):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(layers):
        A, B = torch.randn(2, d, generator=g), torch.randn(2 * d, 2, generator=g)
        found[f"blocks.{i}.fc1"] = LowRank(A, B, 1.5)
    return save_adapter(Adapter(found, "base", name=f"t{seed}"), folder / f"t{seed}")


def python(*args):
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def prepared(tmp_path, method, options, **sizes):
    """A folder of one expert, the next two, and the digests of old, new and final state and merge."""
    paths = [expert(seed, tmp_path, **sizes) for seed in range(3)]
    old = tmp_path / "old"
    start_folder(old, continual.make(method, **options), paths[0])
    known = {1: {"state": digest(old), "merge": seen(old)}}
    # In a process like the others: how a product is rounded may depend on the number of threads.
    shutil.copytree(old, tmp_path / "whole", symlinks=True)
    for t in (1, 2):
        process = python("nscmerge", "continual", "append", tmp_path / "whole", "--adapter", paths[t])
        assert process.wait() == 0, process.stderr.read().decode()
        known[t + 1] = {"state": digest(tmp_path / "whole"), "merge": seen(tmp_path / "whole")}
    return old, paths, known


@pytest.mark.parametrize("mode", ["kill", "full"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nufilt", {"filter_rank": 3, "adapter_rank": 3, "steps": 5}),  # stays in factors
        pytest.param("wudi", {}, marks=pytest.mark.slow),  # goes dense
    ],
)
def test_before_every_file_operation(method, options, mode, tmp_path):
    old, paths, known = prepared(tmp_path, method, options)
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.append_killed", *map(str, (old, *paths[1:], tmp_path / "scratch", mode))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 20
    ends = set()
    for line in lines:
        assert line["checked"] == 0, line
        found = line["found"]
        # State and merge belong together at every moment, and whatever comes next is as if nothing had happened.
        assert {"state": found["state"], "merge": found["merge"]} == known[found["t"]], line
        assert found["final"] == known[3]["state"], line
        assert (found["left"], found["steps"]) == ([], ["0003"]), line
        ends.add((line["status"], found["t"]))
        if line["status"] == 1:
            assert "cannot be written" in line["said"]
    # Killed before and after the switch, and the last one through; a full disk refuses, or is met too late to matter.
    assert ends == ({(-signal.SIGKILL, 1), (-signal.SIGKILL, 2), (0, 2)} if mode == "kill" else {(1, 1), (0, 2)})


@pytest.mark.slow
def test_at_random_moments(tmp_path):
    """The command itself, with SIGKILL from outside: within the whole run, or soon after it begins to write."""
    old, paths, known = prepared(tmp_path, "nufilt", {}, layers=6, d=192)
    chance = random.Random(0)
    copy = tmp_path / "timed"
    shutil.copytree(old, copy, symlinks=True)
    begin = time.monotonic()
    process = python("nscmerge", "continual", "append", copy, "--adapter", paths[1])
    while len(list((copy / "steps").iterdir())) < 2 and process.poll() is None:
        time.sleep(0.002)
    until_writing = time.monotonic() - begin
    while (copy / "current").readlink() == Path("steps/0001") and process.poll() is None:
        time.sleep(0.002)
    # A little longer than until the switch, so that both sides of it are met.
    writing = 1.3 * (time.monotonic() - begin - until_writing)
    process.wait()
    seen_ends = []
    for n in range(KILLS):
        folder = tmp_path / f"random{n}"
        shutil.copytree(old, folder, symlinks=True)
        process = python("nscmerge", "continual", "append", folder, "--adapter", paths[1])
        if n % 4:
            while len(list((folder / "steps").iterdir())) < 2 and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, writing))
        else:
            time.sleep(chance.uniform(0, until_writing))
        process.kill()
        process.wait()
        t = load_state(folder).t
        assert {"state": digest(folder), "merge": seen(folder)} == known[t]
        for path in paths[t:]:
            going_on = python("nscmerge", "continual", "append", folder, "--adapter", path)
            assert going_on.wait() == 0, going_on.stderr.read().decode()
        assert digest(folder) == known[3]["state"]
        assert [p.name for p in (folder / "steps").iterdir()] == ["0003"]
        seen_ends.append((process.returncode, t))
    print(f"\n{KILLS} kills: " + ", ".join(f"{seen_ends.count(end)} x {end}" for end in sorted(set(seen_ends))))
    assert any(code == -signal.SIGKILL for code, _ in seen_ends)


def test_start_that_is_cut_off_leaves_nothing_that_counts(tmp_path, monkeypatch):
    path = expert(0, tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nscmerge.continual.folder.switch", stop)
    with pytest.raises(KeyboardInterrupt):
        start_folder(tmp_path / "f", continual.make("nufilt"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["t0"]


def test_two_at_once(tmp_path):
    """The second is refused while the first is at work, and goes in afterwards."""
    import fcntl

    paths = [expert(seed, tmp_path) for seed in range(2)]
    start_folder(tmp_path / "f", continual.make("opcm"), paths[0])
    before = digest(tmp_path / "f")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process is appending"):
        append_to(tmp_path / "f", paths[1])
    assert digest(tmp_path / "f") == before
    os.close(descriptor)
    assert append_to(tmp_path / "f", paths[1]).t == 2
