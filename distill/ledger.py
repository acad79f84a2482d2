"""costs.jsonl: what every piece of a run took, a line a piece, written by the main process as it is done. cost.py adds the lines up.

All seconds of a process belong to the piece that they lead to, loading included. A piece that is done again after a kill counts its seconds again and its
questions and tokens once: lines of one unit replace each other. Seconds between a process's last line and its end by SIGKILL are told by its pulse.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..files import whole_file
from . import ranks

LEDGER, PULSE = "costs.jsonl", ".pulse"
EVERY = 1.0  # seconds between two pulses


@dataclass(frozen=True)
class Counts:
    """What a piece did: questions, answers, tokens read (prompts, and answers where they are read) and written, forwards in generation, operations.

    Operations are None where a server computed.
    """

    questions: int = 0
    answers: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    forwards: int = 0
    operations: float | None = 0.0


class Ledger:
    """A run's ledger for the life of one process of it; only the main one writes."""

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.pulse = out, out / LEDGER, out / PULSE
        self.started = self.since = time.monotonic()
        self.opened = False
        self._ended = threading.Event()

    def open(self) -> None:
        """Go on with what earlier lives have written; nothing is, before."""
        if not ranks.is_main():
            return
        rows = read_ledger(self.out)
        with whole_file(self.path) as part:  # without a line that a kill has cut
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.life = 1 + max((row["life"] for row in rows), default=0)
        self._write(_lost(self.pulse, rows))
        self.opened = True
        threading.Thread(target=self._beat, daemon=True).start()

    def add(self, stage: str, name: str = "", unit: str = "", counts: Counts | None = None) -> None:
        """A piece is done: `name` is what of a stage it belongs to, such as a source of answers, and `unit` which piece of that."""
        if not self.opened:
            return
        now = time.monotonic()
        row = {"life": self.life, "stage": stage, "name": name, "unit": unit, "seconds": now - self.since, **asdict(counts or Counts())}
        self.since = now
        self._write(row | {"processes": ranks.count(), "device": ranks.device().type, "peak_bytes": _peak(reset=True)})

    def close(self) -> None:
        """End the pulse: what is left belongs to the end of the run."""
        if self.opened and not self._ended.is_set():
            self.add("end", unit=str(self.life))
            self._ended.set()
            self.pulse.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                self.pulse.write_text(json.dumps({"life": self.life, "seconds": time.monotonic() - self.started}))
            except OSError:  # a full disk ends the run elsewhere, with a message
                return

    def _write(self, row: Mapping[str, Any] | None) -> None:
        if row is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"could not write {self.path}: {error.strerror}; free some space, then run again") from None


def read_ledger(out: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's ledger, in order; none where there is none."""
    path = out / LEDGER
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows += [row] if isinstance(row, dict) and "life" in row and "stage" in row else []
    return rows


def _lost(pulse: Path, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The seconds that a killed process worked after its last line, as a line."""
    try:
        last = json.loads(pulse.read_text())
        mine = [row for row in rows if row["life"] == last["life"]]
        seconds = last["seconds"] - sum(row["seconds"] for row in mine)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pulse.unlink(missing_ok=True)
    if seconds <= 0:
        return None
    how = {"processes": mine[-1]["processes"], "device": mine[-1]["device"]} if mine else {"processes": ranks.count(), "device": ranks.device().type}
    return {"life": last["life"], "stage": "interrupted", "name": "", "unit": str(last["life"]), "seconds": seconds, **asdict(Counts()), **how, "peak_bytes": 0}


def _peak(reset: bool) -> int:
    """The most memory, in bytes, since it was reset: of this process's GPU, or what is resident of the process itself where Linux tells."""
    if torch.cuda.is_available():
        found = int(torch.cuda.max_memory_allocated())
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return found
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    [found] = [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")] or [0]
    if reset and os.access("/proc/self/clear_refs", os.W_OK):
        with contextlib.suppress(OSError):  # a container may forbid it: then peaks are those since the process began
            Path("/proc/self/clear_refs").write_text("5")
    return found
