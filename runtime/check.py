"""Checking a bundle on this device: accuracy over a file of questions, then, apart from it, latency, memory, size and cold start.

Reported as MLPerf Mobile and its like do: one stream, warm-up, a least count and a least time, p50 and p90, threads and provider stated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bootstrap import Interval, mean_interval, paired_difference
from ..errors import DataError, RecipeError
from ..manifest import NAME, stored_bytes
from ..progress import bar
from ..samples import Sample, read_samples
from ..scoring import score
from . import load
from .budget import Budget, Gate, judge, read_budget
from .device import Device, this_device
from .graphs import OnnxParts
from .latency import ColdStart, Latency, Sustained, ask, measure_cold_start, measure_latency, measure_sustained
from .memory import MB, peak_rss_mb
from .session import Vlm


@dataclass(frozen=True)
class CheckConfig:
    """What to check a bundle with."""

    bundle: Path
    data: Path
    budget: Path | None = None
    reference: Path | None = None  # the PyTorch model's answers: JSONL rows of id and text
    provider: str = "cpu"
    threads: int | None = None
    limit: int | None = None  # questions
    max_tokens: int = 32
    min_count: int = 16  # answers of the latency run
    min_seconds: float = 3.0  # of the latency run
    warm_up: int = 1  # answers
    cold_starts: int = 3  # processes; 0 measures none
    sustained_seconds: float = 60.0  # of one question over and over; 0 measures nothing

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 1),
            ("max_tokens", 1),
            ("min_count", 1),
            ("warm_up", 1),
            ("cold_starts", 0),
            ("min_seconds", 0),
            ("sustained_seconds", 0),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True)
class Scored:
    """One question's greedy answer and its score in [0, 1]."""

    id: str
    text: str
    score: float


@dataclass(frozen=True)
class Accuracy:
    """The mean score with its bootstrap interval; against stored answers, theirs and the paired difference (ours - theirs)."""

    mean: Interval
    reference: Interval | None
    difference: Interval | None
    answers: tuple[Scored, ...]


@dataclass(frozen=True)
class CheckReport:
    """All that a check found."""

    bundle: str
    target: str
    provider: str
    threads: int
    device: Device
    accuracy: Accuracy
    latency: Latency
    sustained: Sustained | None
    cold_start: ColdStart | None
    bundle_mb: float
    peak_rss_mb: float | None  # of the process that ran the check
    gates: tuple[Gate, ...]
    placement: dict[str, dict[str, int]] = field(default_factory=dict)  # of each graph: how many nodes run on which provider

    @property
    def passed(self) -> bool:
        """Whether every limit of the budget holds; one that could not be measured doesn't."""
        return all(gate.verdict == "pass" for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed}


def check(config: CheckConfig, vlm: Vlm | None = None) -> CheckReport:
    """Check the bundle of `config`, or `vlm` where the caller has it open (on whatever engine).

    Raises DataError for questions or reference answers that can't be used, RecipeError for the budget, BundleError for the bundle.
    """
    budget = read_budget(config.budget) if config.budget else Budget()
    samples = read_samples(config.data, config.limit)
    reference = read_reference(config.reference, samples) if config.reference else None
    if budget.max_drop is not None and reference is None:
        raise RecipeError(f"{config.budget} sets max_drop without anything to compare with; give the PyTorch model's answers as reference, or remove it")
    vlm = vlm or load(config.bundle, config.provider, config.threads)
    accuracy = measure_accuracy(vlm, samples, config.max_tokens, reference)
    latency = measure_latency(vlm, samples, config.max_tokens, config.min_count, config.min_seconds, config.warm_up)
    sustained = measure_sustained(vlm, samples[0], config.max_tokens, config.sustained_seconds) if config.sustained_seconds else None
    cold = None
    if config.cold_starts and isinstance(vlm.parts, OnnxParts):
        cold = measure_cold_start(vlm.folder, vlm.parts.provider, vlm.parts.threads, samples[0], config.max_tokens, config.cold_starts)
    report = CheckReport(
        bundle=vlm.folder.name,
        target=vlm.manifest.target,
        provider=vlm.parts.provider,
        threads=vlm.parts.threads,
        device=this_device(),
        accuracy=accuracy,
        latency=latency,
        sustained=sustained,
        cold_start=cold,
        bundle_mb=bundle_bytes(vlm) / MB,
        peak_rss_mb=peak_rss_mb(),
        gates=(),
        placement=getattr(vlm.parts, "placement", {}),
    )
    return dataclasses.replace(report, gates=judge(budget, figures(report)))


def measure_accuracy(vlm: Vlm, samples: Sequence[Sample], max_tokens: int, reference: dict[str, str] | None = None) -> Accuracy:
    """Greedy answers to all `samples`, scored; `reference` holds another model's answer for each id."""
    answers = []
    for sample in bar(samples, "accuracy", total=len(samples)):
        text = ask(vlm, sample, max_tokens).text
        answers.append(Scored(sample.id, text, score(sample, text)))
    ours = [answer.score for answer in answers]
    if reference is None:
        return Accuracy(mean_interval(ours), None, None, tuple(answers))
    theirs = [score(sample, reference[sample.id]) for sample in samples]
    return Accuracy(mean_interval(ours), mean_interval(theirs), paired_difference(ours, theirs), tuple(answers))


def read_reference(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Stored answers by id. Raises DataError, naming file and row, if one is malformed or a question has none."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").strip("\n").split("\n")  # splitlines() would break at U+2028 within a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read stored answers from {path} ({error}); expected JSONL rows of id and text") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found[str(row["id"])] = str(row["text"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path} row {number} is no stored answer; expected {{"id": "…", "text": "…"}}') from None
    for sample in samples:
        if sample.id not in found:
            raise DataError(f"{path} holds no answer for the question '{sample.id}'; expected one for each, write it with the same file of questions")
    return found


def figures(report: CheckReport) -> dict[str, float | None]:
    """The measured figures by the names that a budget gives them."""
    difference, decode, cold = report.accuracy.difference, report.latency.decode, report.cold_start
    return {
        "min_accuracy": report.accuracy.mean.mean,
        "max_drop": -difference.low if difference else None,
        "first_token_p90_ms": report.latency.first_token.p90,
        "decode_p50_ms": decode.p50 if decode else None,
        # A process of its own holds the runtime and the bundle alone; this one may hold anything.
        "peak_rss_mb": cold.peak_rss_mb if cold else report.peak_rss_mb,
        "bundle_mb": report.bundle_mb,
        "cold_start_ms": cold.first_token if cold else None,
    }


def bundle_bytes(vlm: Vlm) -> int:
    """The size of the bundle's files, the manifest included."""
    return stored_bytes(vlm.manifest.files) + (vlm.folder / NAME).stat().st_size
