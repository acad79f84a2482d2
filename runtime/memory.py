"""How much memory this process has taken, and giving back what it does not need now."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MB = 1e6  # bytes
Range = tuple[int, int]  # of addresses
_locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


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


@contextmanager
def mapped_meanwhile(file: Path) -> Iterator[list[Range]]:
    """Where the block's work has mapped `file` into memory, filled in at its end; nothing but on Linux. One block at a time for a file."""
    file = file.resolve()
    with _locks[file]:
        before, found = _mapped(file), list[Range]()
        yield found
        found.extend(sorted(_mapped(file) - before))


def give_back(ranges: Sequence[Range]) -> None:
    """Take mapped pages of a file out of this process's memory; whoever touches one reads it again, mostly from the system's own cache of files.

    Nobody may have written to them, and they have to be mapped still: both are so for a session's weights as long as the session lives.
    """
    _advise(ranges, 4)  # MADV_DONTNEED


def take(ranges: Sequence[Range]) -> None:
    """Bring mapped pages of a file into this process's memory at once, which costs a quarter of touching one after the other; older systems do the latter."""
    _advise(ranges, 22)  # MADV_POPULATE_READ, Linux 5.14


def _advise(ranges: Sequence[Range], advice: int) -> None:
    if ranges:
        system = ctypes.CDLL(None)
        for start, end in ranges:
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def give_back_freed() -> None:
    """Give what was freed, and is only kept for later, back to the system, where the C library can: reading a tokenizer frees 20 MB."""
    if sys.platform == "linux" and hasattr(system := ctypes.CDLL(None), "malloc_trim"):
        system.malloc_trim(0)


def _mapped(file: Path) -> set[Range]:
    if sys.platform != "linux":
        return set()
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines())
    spans = (fields[0].split("-") for fields in lines if fields[5:] == [str(file)])
    return {(int(start, 16), int(end, 16)) for start, end in spans}
