"""Intervals against SciPy's bootstrap, and by what they promise: how often they hold the true mean."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from masters import bootstrap
from masters.bootstrap import Interval, crossed_interval, mean_interval, paired_difference


@pytest.mark.parametrize(("count", "level"), [(40, 0.95), (300, 0.95), (300, 0.8), (1200, 0.99)])
def test_against_scipy(count: int, level: float) -> None:
    scores = np.random.default_rng(count).beta(2, 1, size=count)
    ours = mean_interval(scores, level)
    theirs = scipy.stats.bootstrap((scores,), np.mean, confidence_level=level, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    # The quantiles of 10,000 resamples themselves wander by a few hundredths of the interval's width.
    tolerance = 0.04 * (theirs.high - theirs.low)
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_difference_against_scipy() -> None:
    rng = np.random.default_rng(0)
    theirs_scores = rng.random(400) < 0.6
    ours_scores = theirs_scores ^ (rng.random(400) < 0.1)
    found = paired_difference(ours_scores, theirs_scores)

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis=axis) - b.mean(axis=axis)

    pair = (ours_scores.astype(float), theirs_scores.astype(float))
    expected = scipy.stats.bootstrap(pair, difference, paired=True, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 experiments with 120 questions at a true accuracy of 0.7, the 95% interval holds 0.7 in about 95%."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.random(120) < 0.7, seed=trial) for trial in range(400)]
    coverage = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])
    # Four standard errors of a proportion over 400 trials, around what the percentile method gives at this size.
    assert 0.90 <= coverage <= 0.98, coverage


def test_pairing_finds_what_two_separate_intervals_miss() -> None:
    """24 of 800 questions gained, none lost: beyond doubt when paired, lost in the questions' own variance when not."""
    rng = np.random.default_rng(0)
    before = (rng.random(800) < 0.6).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:24]] = 1
    assert paired_difference(after, before).excludes_zero()
    assert mean_interval(after).low < mean_interval(before).high


def test_no_difference_rarely_excludes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    found = [paired_difference(rng.random(150) < 0.5, rng.random(150) < 0.5, seed=trial).excludes_zero() for trial in range(300)]
    assert 0 < np.mean(found) < 0.1


def test_same_seed_same_interval_and_questions_may_be_reordered_in_pairs() -> None:
    scores = np.random.default_rng(3).random(50)
    assert mean_interval(scores) == mean_interval(list(scores))
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_degenerate_scores() -> None:
    assert mean_interval([1.0] * 20) == Interval(1.0, 1.0, 1.0, 20)
    assert paired_difference([0.5] * 9, [0.5] * 9).excludes_zero() is False
    with pytest.raises(ValueError, match="at least one score"):
        mean_interval([])
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_difference([1, 1, 1], [1, 1])


@pytest.mark.parametrize(("low", "high", "excludes"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)])
def test_excludes_zero(low: float, high: float, excludes: bool) -> None:
    assert Interval((low + high) / 2, low, high, 10).excludes_zero() is excludes


def test_print() -> None:
    assert str(Interval(0.8125, 0.79, 0.8349, 2000)) == "0.812 [0.790, 0.835]"


def test_large_sets_are_drawn_in_pieces() -> None:
    """Every resample counts, however the draws are split to bound the memory."""
    assert sum(bootstrap._chunks(1)) == sum(bootstrap._chunks(5_000_000)) == bootstrap.RESAMPLES
    assert max(bootstrap._chunks(5_000_000)) * 5_000_000 <= 8_000_000


def test_crossed_against_indices_drawn_one_by_one() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random((4, 60)) + rng.normal(0, 0.2, size=(4, 1))
    found = crossed_interval(scores)
    means = [scores[rng.integers(0, 4, 4)][:, rng.integers(0, 60, 60)].mean() for _ in range(10_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.mean == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.count == 60


def test_crossed_is_over_questions_alone_where_runs_agree() -> None:
    scores = np.random.default_rng(1).random(300)
    alone = mean_interval(scores)
    for runs in (1, 5):
        found = crossed_interval(np.tile(scores, (runs, 1)))
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.05 * (alone.high - alone.low))


def test_crossed_is_wide_where_runs_differ_and_holds_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and questions each shift a score: an interval over questions alone misses the truth, one over both does not."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    both, alone = [], []
    for trial in range(200):
        scores = rng.normal(0, 0.05, size=(6, 1)) + rng.normal(0, 0.3, size=(1, 150)) + rng.normal(0, 0.3, size=(6, 150))
        crossed, single = crossed_interval(scores, seed=trial), mean_interval(scores.mean(axis=0), seed=trial)
        both.append(crossed.low <= 0 <= crossed.high)
        alone.append(single.low <= 0 <= single.high)
    assert np.mean(both) >= 0.88, np.mean(both)
    assert np.mean(alone) < np.mean(both)


def test_crossed_scores_have_two_axes() -> None:
    for shape in ((3,), (0, 4), (2, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="expected runs x questions"):
            crossed_interval(np.zeros(shape))
