"""verdicts.jsonl: what a judge has said, kept verdict by verdict, so that no answer is judged twice and a killed run loses at most a batch.

A verdict follows from question, ground truth, answer and judge; who gave the answer, and in which mask stage, does not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import RunError
from ..files import write_text
from ..samples import Sample
from . import ranks
from .judge import Verdict


def verdict_key(sample: Sample, text: str, judge: str) -> str:
    """32 hex digits of all that a verdict follows from: `judge` names the judge's weights, or its server's model, and its prompts."""
    values = [sample.prompt, sample.answers, text, judge]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


class VerdictFile:
    """The verdicts by their keys, and how often each was asked for in vain. Lines are only ever added; a torn last one is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Verdict] = {}
        self.failures: dict[str, int] = {}
        lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
        whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
        for number, line in enumerate(whole, start=1):
            try:
                row = json.loads(line)
                self._take(row["key"], Verdict(row["verdict"], row["reason"], row["judge"]))
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path} line {number} is {line.strip()[:60]!r}; expected a verdict, remove that line, and it is asked for again") from None
        ranks.wait()  # all have read it
        if ranks.is_main() and len(whole) < len(lines):
            write_text(path, "".join(whole))

    def add(self, keys: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        """Keep a batch: all processes know it, the main one writes. Raises RunError where it can't be written."""
        for key, verdict in zip(keys, verdicts, strict=True):
            self._take(key, verdict)
        if not ranks.is_main():
            return
        rows = [{"key": key, "verdict": v.value, "reason": v.reason, "judge": v.judge} for key, v in zip(keys, verdicts, strict=True)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise RunError(f"could not write {self.path}: {error.strerror}; free some space, then run again") from None

    def _take(self, key: str, verdict: Verdict) -> None:
        if verdict.value is None:
            self.failures[key] = self.failures.get(key, 0) + 1
        else:
            self.known[key] = verdict
