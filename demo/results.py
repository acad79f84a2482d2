"""The demo's figures as rows and sentences: intervals for every score, and a paired bootstrap for every claim."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bootstrap import mean_interval, paired_difference
from ..runtime.device import this_device

NOTE = "Accuracy: mean score with its 95% bootstrap interval over n questions. Core ML is run by an interpreter here, so its speed is not measured."


@dataclass(frozen=True)
class Scores:
    """One model's scores by question, and its speed for one question at a time, in milliseconds; None where the device is not at hand."""

    parameters: int
    test: Sequence[float]
    ood: Sequence[float]
    first_token_ms: float | None
    per_token_ms: float | None
    texts: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of_reports(reports: Mapping[str, Mapping[str, Any]], parameters: int, interpreted: bool) -> Scores:
        """From the check reports of a bundle on test and ood. An interpreter's speed says nothing about the device, so it is left out."""
        latency = reports["test"]["latency"]
        first = None if interpreted else latency["first_token"]["p50"]
        token = None if interpreted or latency["decode"] is None else latency["decode"]["p50"]
        test, ood = ([answer["score"] for answer in reports[split]["accuracy"]["answers"]] for split in ("test", "ood"))
        return Scores(parameters, test, ood, first, token)


def row(name: str, folder: Path, scores: Scores) -> tuple[str, ...]:
    """One line of the table: size on disk, accuracy with its interval and its number of questions, speed."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return (
        name,
        f"{scores.parameters / 1e6:.2f} M",
        f"{size / 1e6:.2f}",
        *(f"{mean_interval(values)} n={len(values)}" for values in (scores.test, scores.ood)),
        *("–" if value is None else f"{value:.1f}" for value in (scores.first_token_ms, scores.per_token_ms)),
    )


def compare(test: Mapping[str, Sequence[float]], trained: Sequence[str]) -> list[str]:
    """Which of the trained students beat the untouched one, and each other, on test: a sentence a pair, whatever the answer is."""
    pairs = [(name, "student") for name in trained] + list(itertools.combinations(trained, 2))
    return [_sentence(a, b, test) for a, b in pairs]


def _sentence(a: str, b: str, test: Mapping[str, Sequence[float]]) -> str:
    found = paired_difference(test[a], test[b])
    words = {"student": "the untouched student"}
    left, right = words.get(a, a), words.get(b, b)
    if not found.excludes_zero():
        return f"{left} and {right} can't be told apart: {100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]."
    if found.mean < 0:
        left, right, found = right, left, paired_difference(test[b], test[a])
    return f"{left} beats {right} by {100 * found.mean:.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}]."


def summary(table: str, sentences: Sequence[str], threads: int) -> str:
    """What the demo prints at its end."""
    return "\n".join([table, "", *sentences, "", f"{this_device()}; {threads} threads.", NOTE])
