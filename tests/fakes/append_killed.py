"""Append to copies of a growing folder, each killed before another file operation; run as a script, prints JSON lines.

    python -m tests.fakes.append_killed FOLDER NEXT THIRD SCRATCH kill|full

``kill`` ends the process with SIGKILL before its n-th file operation, ``full`` lets that operation fail as on a full
disk; n = 1, 2, ... until an append has no n-th one. After each a fresh process says what the folder holds, and goes on.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from nscmerge.continual.folder import append_to, load_state
from nscmerge.continual.pointer import current_step
from nscmerge.errors import OutputError
from nscmerge.update import load_update

#: Operations that change a disk, as the interpreter reports them just before they happen.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "shutil.rmtree"}


def digest(folder):
    """Hash of every bit of a state and its merge; receipt and card tell the time."""
    step, found = current_step(Path(folder)), hashlib.sha256()
    for path in sorted(step.iterdir()):
        if path.name in ("state.json",) or path.suffix == ".safetensors":
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def seen(folder):
    """Hash of the merge as the top of the folder shows it."""
    update, found = load_update(folder), hashlib.sha256()
    for name in sorted({*update.layers, *update.dense}):
        found.update(name.encode() + update.delta(name).numpy().tobytes())
    return found.hexdigest()


def look(folder, next_, third):
    """Return what the folder holds now, and after going on."""
    tops = {"state": digest(folder), "merge": seen(folder), "t": load_state(folder).t}
    if tops["t"] == 1:
        append_to(folder, next_)
    append_to(folder, third)
    left = sorted(p.name for p in [*folder.iterdir(), *(folder / "steps").iterdir()] if p.name.startswith("."))
    steps = sorted(p.name for p in (folder / "steps").iterdir())
    return tops | {"final": digest(folder), "left": left, "steps": steps}


def arm(folder, n, mode):
    """Let the n-th change below ``folder`` end the process, or fail; return what says how many there were."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event == "open":
            # (path, mode, flags): only those that may write.
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in CHANGES
        if not changes:
            return
        inside = any(str(a).startswith(str(folder)) for a in args if isinstance(a, str | os.PathLike))
        # Removing a tree names files relative to an open directory.
        relative = event in ("os.remove", "os.rmdir") and args[-1] != -1
        if inside or relative:
            count += 1
            if count == n and mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == n:
                raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)
    return lambda: count


def forked(work):
    """Run ``work`` in a child; return its exit status (negative: the signal) and what it returned."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        result, code = None, 0
        try:
            result = work()
        except OutputError as error:
            result, code = str(error), 1
        except BaseException as error:  # a child must not go on as its parent
            result, code = f"{type(error).__name__}: {error}", 2
        with os.fdopen(write, "w") as out:
            json.dump(result, out)
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


def main(template, next_, third, scratch, mode):
    torch.set_num_threads(1)
    for n in range(1, 1000):
        folder = Path(scratch) / f"{mode}{n}"
        shutil.copytree(template, folder, symlinks=True)

        def append(folder=folder, n=n):
            changes = arm(folder, n, mode)
            append_to(folder, next_)
            return changes()

        status, said = forked(append)
        checked, found = forked(lambda folder=folder: look(folder, next_, third))
        print(json.dumps({"n": n, "status": status, "said": said, "checked": checked, "found": found}), flush=True)
        shutil.rmtree(folder)
        if status == 0 and said < n:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
