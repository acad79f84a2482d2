"""How much memory this process has taken."""

from __future__ import annotations

import sys
from pathlib import Path

MB = 1e6  # bytes


def peak_rss_mb() -> float | None:
    """The most memory that this process has held at once, in MB; None where the system doesn't say."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count the parent's memory too: it survives the start of a program.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MB
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB
    return None
