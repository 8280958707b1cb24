"""How much memory this process has needed so far."""

from __future__ import annotations

import sys


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
