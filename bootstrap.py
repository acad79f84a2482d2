"""Intervals for scores: the percentile bootstrap over questions, seeded, so that a table is the same each time it is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean of per-question scores (or of paired differences) and its two-sided interval at `level`."""

    mean: float
    low: float
    high: float
    count: int
    level: float = 0.95

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(scores: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of `scores` (one per question), Efron & Tibshirani 1993, percentile method."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one score")
    rng = np.random.default_rng(seed)
    means = np.concatenate([_resampled_means(values, rng, n) for n in _chunks(values.size)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), values.size, level)


def paired_difference(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of mean(ours - theirs), resampling questions: both lists hold the same questions in the same order."""
    if len(ours) != len(theirs):
        raise ValueError(f"paired scores need the same questions, got {len(ours)} and {len(theirs)}")
    return mean_interval(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64), level, seed)


def crossed_interval(scores: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of `scores` [runs, questions], resampling runs and questions independently of each other.

    For differences give those of pairs, run by run and question by question. This is Owen's pigeonhole bootstrap (2007), which for two crossed
    random effects errs on the wide side; with one run it is `mean_interval`, and says nothing of what another run would give.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"crossed scores have shape {values.shape}; expected runs x questions")
    runs, questions = values.shape
    rng = np.random.default_rng(seed)
    means = []
    for n in _chunks(questions):
        times_run = rng.multinomial(runs, np.full(runs, 1 / runs), size=n)
        drawn = rng.integers(0, questions, size=(n, questions))
        means.append(np.take_along_axis(times_run @ values, drawn, axis=1).mean(axis=1) / runs)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), questions, level)


def sums_interval(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of a `statistic` of sums over questions, such as a correlation: `sums` [questions, ...] are each question's own, and questions are resampled.

    `statistic` takes sums [..., of one question's shape] and returns one number for each; draws in which it is not defined (NaN) are left out.
    """
    questions = len(sums)
    if questions == 0:
        raise ValueError("an interval needs at least one question")
    rng, flat = np.random.default_rng(seed), sums.reshape(questions, -1)
    drawn = []
    for n in _chunks(questions):
        times = rng.multinomial(questions, np.full(questions, 1 / questions), size=n)
        drawn.append(statistic((times @ flat).reshape(n, *sums.shape[1:])))
    values = np.concatenate(drawn)
    values, whole = values[np.isfinite(values)], float(statistic(sums.sum(0)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if values.size else (whole, whole)
    return Interval(whole, float(low), float(high), questions, level)


def median_ratio(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of median(ours) / median(theirs), two unpaired samples such as latencies, each resampled by itself; `mean` is the ratio."""
    samples = [np.asarray(values, dtype=np.float64) for values in (ours, theirs)]
    if not all(values.size for values in samples):
        raise ValueError("a ratio of medians needs at least one value on each side")
    rng = np.random.default_rng(seed)
    medians = [np.concatenate([np.median(_resampled(values, rng, n), axis=1) for n in _chunks(values.size)]) for values in samples]
    low, high = np.quantile(medians[0] / medians[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(samples[0]) / np.median(samples[1])), float(low), float(high), min(values.size for values in samples), level)


def _resampled_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    return _resampled(values, rng, resamples).mean(axis=1)


def _resampled(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """`resamples` draws with replacement, one a row."""
    return values[rng.integers(0, values.size, size=(resamples, values.size))]


def _chunks(size: int) -> list[int]:
    """RESAMPLES split so that one draw holds at most about 8M indices."""
    step = max(1, min(RESAMPLES, 8_000_000 // size))
    return [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
