"""How long answers take: a warm run over questions, one at a time, and cold starts in processes of their own."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BundleError
from ..progress import bar
from ..samples import Sample
from .answer import Answer, Timings
from .energy import EnergyMeter
from .session import Vlm


@dataclass(frozen=True)
class Spread:
    """Median and 90th percentile of some milliseconds."""

    p50: float
    p90: float
    count: int


@dataclass(frozen=True)
class Latency:
    """A warm run: the stages of an answer, and each token after the first."""

    answers: int
    seconds: float
    image_preprocess: Spread
    image_encode: Spread
    prefill: Spread
    first_token: Spread
    decode: Spread | None  # None where every answer was one token long
    total: Spread
    joules: float | None  # of the whole processor, an answer; None where its counters can't be read
    first_tokens: tuple[float, ...]  # ms, every answer's
    decode_steps: tuple[float, ...]  # ms, every further token's


@dataclass(frozen=True)
class Sustained:
    """One question asked over and over: whether the device keeps its speed, or heats up and slows down."""

    seconds: float
    ends: tuple[float, ...]  # s since the start, of every answer
    totals: tuple[float, ...]  # ms, of every answer

    @property
    def burst(self) -> float:
        """Answers a second in the first tenth of the time."""
        return _rate(self.totals, [end <= 0.1 * self.seconds for end in self.ends], self.totals[:1])

    @property
    def steady(self) -> float:
        """Answers a second in the last tenth of the time."""
        return _rate(self.totals, [end > 0.9 * self.seconds for end in self.ends], self.totals[-1:])


@dataclass(frozen=True)
class ColdStart:
    """A fresh process that imports the runtime, loads the bundle with its verification, and answers once; medians."""

    runs: int
    first_token: float  # ms from the start of the process
    load: float  # ms, verification included
    peak_rss_mb: float | None


# What an application does, and nothing more, before it reports.
_COLD = """
import json, sys, time
from masters.runtime import load
bundle, provider, threads, question, images, max_tokens = json.loads(sys.argv[1])
start = time.perf_counter()
vlm = load(bundle, provider, threads)
loaded = time.perf_counter()
timings = vlm.answer(question, images, max_tokens=max_tokens).timings
from masters.runtime.memory import peak_rss_mb
print(json.dumps({"load": 1000 * (loaded - start), "after_first_token": timings.total - timings.first_token, "peak_rss_mb": peak_rss_mb()}))
"""


def measure_latency(vlm: Vlm, samples: Sequence[Sample], max_tokens: int, min_count: int, min_seconds: float, warm_up: int = 1) -> Latency:
    """Answer `samples` over and over, one at a time, greedily, until both `min_count` answers and `min_seconds` have passed.

    The first `warm_up` answers (at least one) are not counted.
    """
    questions = itertools.cycle(samples)
    for sample in itertools.islice(questions, max(1, warm_up)):
        ask(vlm, sample, max_tokens)
    found: list[Timings] = []
    meter, start = EnergyMeter(), time.perf_counter()
    while len(found) < min_count or time.perf_counter() - start < min_seconds:
        found.append(ask(vlm, next(questions), max_tokens).timings)
    return summarise(found, time.perf_counter() - start, meter.joules())


def measure_sustained(vlm: Vlm, sample: Sample, max_tokens: int, seconds: float) -> Sustained:
    """Answer one sample again and again for `seconds`: equal work, so that a change is the device's."""
    ends: list[float] = []
    totals: list[float] = []
    start = time.perf_counter()
    for second in bar(range(math.ceil(seconds)), "sustained", total=math.ceil(seconds)):
        while not ends or ends[-1] < min(second + 1, seconds):
            totals.append(ask(vlm, sample, max_tokens).timings.total)
            ends.append(time.perf_counter() - start)
    return Sustained(ends[-1], tuple(ends), tuple(totals))


def ask(vlm: Vlm, sample: Sample, max_tokens: int) -> Answer:
    """The greedy answer to a sample."""
    return vlm.answer(sample.prompt, sample.images, max_tokens=max_tokens)


def summarise(found: Sequence[Timings], seconds: float, joules: float | None = None) -> Latency:
    """The figures of a run of answers that took `seconds` and, where it was measured, `joules` in all."""
    steps = [step for timings in found for step in timings.decode_steps]
    return Latency(
        answers=len(found),
        seconds=seconds,
        image_preprocess=spread(t.image_preprocess for t in found),
        image_encode=spread(t.image_encode for t in found),
        prefill=spread(t.prefill for t in found),
        first_token=spread(t.first_token for t in found),
        decode=spread(steps) if steps else None,
        total=spread(t.total for t in found),
        joules=None if joules is None else joules / len(found),
        first_tokens=tuple(round(t.first_token, 4) for t in found),
        decode_steps=tuple(round(step, 4) for step in steps),
    )


def _rate(totals: Sequence[float], within: Sequence[bool], otherwise: Sequence[float]) -> float:
    """Answers a second of those `within` a time; of `otherwise`, where that time was too short for one."""
    chosen = [total for total, inside in zip(totals, within, strict=True) if inside] or otherwise
    return 1000 * len(chosen) / sum(chosen)


def spread(values: Iterable[float]) -> Spread:
    found = np.fromiter(values, np.float64)
    return Spread(float(np.quantile(found, 0.5)), float(np.quantile(found, 0.9)), found.size)


def measure_cold_start(bundle: Path, provider: str, threads: int, sample: Sample, max_tokens: int, runs: int = 3) -> ColdStart:
    """Start `runs` processes, one after the other. Raises BundleError with the process's own last line if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        images = [str(_as_file(image, Path(folder) / str(number))) for number, image in enumerate(sample.images)]
        order = json.dumps([str(bundle.resolve()), provider, threads, sample.prompt, images, max_tokens])
        found = [_cold_run(order) for _ in range(runs)]
    first, load, memory = zip(*found, strict=True)
    held = [value for value in memory if value is not None]
    return ColdStart(runs, statistics.median(first), statistics.median(load), statistics.median(held) if held else None)


def _cold_run(order: str) -> tuple[float, float, float | None]:
    """(first token, load) in ms and peak memory in MB of one process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen([sys.executable, "-c", _COLD, order], stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            elapsed = 1000 * (time.perf_counter() - start)
        complaints.seek(0)
        last = (complaints.read().strip().splitlines() or ["no message"])[-1]
    if not line:
        raise BundleError(f"a fresh process could not load the bundle and answer ({last}); expected it to do what this one does")
    report = json.loads(line)
    return elapsed - report["after_first_token"], report["load"], report["peak_rss_mb"]


def _as_file(image: Path | bytes, place: Path) -> Path:
    if isinstance(image, bytes):
        place.write_bytes(image)
        return place
    return image.resolve()
