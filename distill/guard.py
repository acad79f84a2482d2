"""Run a command in a process group of its own, and end that group when the process that asked for it is gone, however it went.

    python guard.py PARENT-PID COMMAND ARGUMENT ...

Run by its path, with nothing but the standard library: it stays beside a server for hours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

GRACE = 15.0  # seconds between asking a group to end and killing it
EVERY = 0.2


def main(parent: int, command: list[str]) -> int:
    """The command's exit status; 127 where it can't be started."""
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)  # and no exception: it could strike while the command is being started, and lose it

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]} can't be started: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(EVERY)
    _end(child)
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """The command first, in its own way; then whatever of its group is left."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
