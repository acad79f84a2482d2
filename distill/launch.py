"""Our own server for one set of weights: started on a checkpoint folder, used when it is healthy, ended with all its processes.

Other weights get another process, so that no cache of prefixes or images outlives the weights that filled it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from ..errors import MastersError, RunError
from ..progress import say

GUARD = Path(__file__).with_name("guard.py")
EVERY = 0.1  # seconds between questions after its health


@dataclass(frozen=True)
class Launch:
    """How a server is started: {model} stands for the checkpoint folder, {port} for a free port, {name} for the model's name in requests."""

    command: tuple[str, ...] = ("vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "{name}")
    arguments: tuple[str, ...] = ()  # more of the server's own, such as --tensor-parallel-size 8
    start_timeout: float = 3600.0  # seconds; loading and compiling a large model takes many minutes


@contextmanager
def serving(launch: Launch, model: Path, name: str, log: Path) -> Iterator[str]:
    """The address, up to and with /v1, of a server that serves `model` as `name` within this block; what it prints goes to `log`.

    Raises RunError, with the log's last line, if it ends or is not healthy in time. It ends when the block does, and also when this process is killed.
    """
    port = _free_port()
    command = [_filled(part, {"model": str(model), "port": str(port), "name": name}) for part in (*launch.command, *launch.arguments)]
    if not command or shutil.which(command[0]) is None:
        raise RunError(f"'{command[0] if command else ''}' is no program here; install it (pip install vllm), or name another one in answers.vllm.command")
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"starting {command[0]} for {name}; it prints to {log}")
    with open(log, "ab") as printed:
        guard = subprocess.Popen(
            # -I: neither this folder nor the user's own modules stand in for the standard library's.
            [sys.executable, "-I", str(GUARD), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(guard, port, launch, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        guard.terminate()
        guard.wait()


def _filled(part: str, values: Mapping[str, str]) -> str:
    # Not str.format: arguments may hold braces of their own, such as JSON.
    for key, value in values.items():
        part = part.replace(f"{{{key}}}", value)
    return part


def _wait(guard: subprocess.Popen[bytes], port: int, launch: Launch, log: Path) -> None:
    end = time.monotonic() + launch.start_timeout
    while not _healthy(port):
        if guard.poll() is not None:
            raise RunError(f"{launch.command[0]} ended with {guard.returncode} before it answered: {_last_line(log)}; see {log}")
        if time.monotonic() > end:
            raise RunError(f"{launch.command[0]} was not healthy after {launch.start_timeout:g} s: {_last_line(log)}; see {log}, or raise start_timeout")
        time.sleep(EVERY)


def _healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        raise MastersError(f"could not read {log}: {error.strerror}") from None
    return lines[-1][:200] if lines else "it printed nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
