"""The rules of the watchers at their borders, on rows made by hand and by chance; the failures themselves are provoked in test_watched_runs.py."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from masters.distill.recipe import build_recipe, recipe_values
from masters.distill.watch import SWINGS, WINDOW, Finding, Watch, Watched, accuracy_turns, count_swings, lag_correlation, turning_points, watch

RUN = Watched(total=60)
Row = dict[str, Any]


def step(number: int, **changes: float) -> Row:
    """A row of a step in which nothing is wrong."""
    calm = {"loss": 1.0, "kl": 0.1, "entropy": 0.5, "reward_expected": 1.0, "zero_spread": 0.3}
    return {"kind": "step", "step": number} | calm | changes


def evaluation(number: int, accuracy: float, error: float = 0.02, since: float = 0.05, best: float = 0.0, **changes: float) -> Row:
    row = {"kind": "evaluation", "step": number, "validation_accuracy": accuracy, "validation_low": accuracy - 0.05, "validation_high": accuracy + 0.05}
    row |= {"validation_tokens": 4.0, "validation_commonest": 0.3}
    return row | ({"since_start": since, "since_start_error": error, "since_best": best, "since_best_error": error} if number >= 0 else {}) | changes


def run_of(values: Callable[[int], Row], end: Row, steps: int = 60, start: float = 0.5) -> list[Row]:
    return [evaluation(-1, start), *(values(number) for number in range(steps)), end]


def names(rows: list[Row], run: Watched = RUN) -> list[str]:
    return [finding.name for finding in watch(rows, run)]


def noisy(seed: int, kind: str) -> list[float]:
    draw = random.Random(seed)
    kinds: dict[str, Callable[[int, float], float]] = {
        "even": lambda i, last: draw.gauss(1, 0.2),
        "skewed": lambda i, last: math.exp(draw.gauss(0, 1)),
        "falling": lambda i, last: math.exp(-i / 60) + abs(draw.gauss(0, 0.1)),
        "slow": lambda i, last: 0.8 * last + draw.gauss(0.2, 0.05),
        "stairs": lambda i, last: 1 - 0.15 * (i // 40) + draw.gauss(0, 0.1),
    }
    values = [1.0]
    for i in range(200):
        values.append(kinds[kind](i, values[-1]))
    return values[1:]


@pytest.mark.parametrize("kind", ["even", "skewed", "falling", "slow", "stairs"])
def test_noise_trends_and_stages_are_no_oscillation(kind: str):
    wrong = 0
    for seed in range(20):
        values = noisy(seed, kind)
        rows = [step(i, loss=value) for i, value in enumerate(values)]
        wrong += "oscillation" in names([evaluation(-1, 0.5), *rows], Watched(1000))
    assert wrong <= 1, f"{wrong} of 20 runs of 200 steps"


def test_lag_correlation_is_numpys():
    values = noisy(3, "slow")
    centred = np.array(values) - np.mean(values)
    for lag in range(1, 6):
        assert lag_correlation(values, lag) == pytest.approx(float((centred[lag:] * centred[:-lag]).sum() / (centred**2).sum()))
    assert lag_correlation([2.0] * 40) == 0
    assert lag_correlation([1.0, -1.0] * 20) < -0.95


@pytest.mark.parametrize(("period", "found"), [(2, True), (4, True), (8, True), (10, True), (14, True), (80, False)])
def test_a_figure_that_goes_up_and_down_is_an_oscillation(period: int, found: bool):
    draw = random.Random(0)
    rows = [step(i, kl=0.5 + 0.3 * math.cos(2 * math.pi * i / period) + draw.gauss(0, 0.01)) for i in range(60)]
    told = [f for f in watch([evaluation(-1, 0.5), *rows], Watched(100)) if f.name == "oscillation"]
    assert bool(told) == found
    if told:
        [finding] = told
        assert (finding.figure, finding.step) == ("kl", WINDOW - 1), "as soon as the window is full"
        assert "between 0.1" in finding.said
        assert "lower train.learning_rate" in finding.advice


def test_swings_within_the_noise_or_of_a_hundredth_do_not_count():
    draw = random.Random(0)
    assert count_swings([1 + 0.3 * math.sin(i / 2) + draw.gauss(0, 0.3) for i in range(40)]) < SWINGS
    assert count_swings([1 + 0.01 * math.sin(i / 2) for i in range(40)]) == 0
    assert count_swings([1 + 0.3 * math.sin(i / 2) for i in range(40)]) >= SWINGS
    assert count_swings([1.0] * 40) == 0


def test_turning_points():
    assert turning_points([0, 1, 0.5, 3, 2.5, 0, 0.5, 2], 1) == [0, 3, 0, 2]
    assert turning_points([5, 4, 6, 5.5], 10) == [4], "nothing turns"
    assert turning_points([2, 1, 0, 1, 0.2], 1.5) == [2, 0]


@pytest.mark.parametrize(
    ("accuracies", "found"), [([0.5, 0.1, 0.5, 0.1], False), ([0.5, 0.1, 0.5, 0.1, 0.5], True), ([0.5, 0.45, 0.5, 0.45, 0.5, 0.46], False)]
)
def test_accuracy_that_goes_up_and_down(accuracies: list[float], found: bool):
    rows = [evaluation(10 * i - 1, value) for i, value in enumerate(accuracies)]
    assert (len(accuracy_turns(rows)) > 3) == (len(accuracies) >= 4 and accuracies[1] == 0.1)
    assert ("oscillation" in names(rows)) == (len(accuracies) >= 4 and accuracies[1] == 0.1)
    assert found <= ("oscillation" in names(rows))


@pytest.mark.parametrize(
    ("changes", "end", "figure"),
    [
        ({"kl": 2.1}, {}, "kl"),
        ({"kl": 1.9}, {}, None),
        ({"entropy": 0.02}, {}, "entropy"),
        ({"entropy": 0.03}, {}, None),
        ({}, {"validation_tokens": 1.5}, "validation_tokens"),
        ({}, {"validation_tokens": 1.7}, None),
        ({}, {"validation_tokens": 10.1}, "validation_tokens"),
        ({}, {"validation_tokens": 9.9}, None),
        ({}, {"validation_commonest": 0.9}, "validation_commonest"),
        ({}, {"validation_commonest": 0.89}, None),
        ({}, {"since_start": -0.11, "since_start_error": 0.03}, "validation_accuracy"),
        ({}, {"since_start": -0.11, "since_start_error": 0.032}, None),
        ({}, {"since_start": -0.09, "since_start_error": 0.001}, None),
    ],
)
def test_what_is_a_collapse(changes: dict[str, float], end: dict[str, float], figure: str | None):
    def values(i: int) -> Row:
        return step(i, **(changes if i >= 40 else {}))

    found = [f for f in watch(run_of(values, evaluation(59, 0.5, **end)), Watched(100)) if f.name == "collapse"]
    assert [f.figure for f in found] == ([figure] if figure else [])
    better = run_of(values, evaluation(59, 0.51, **end))
    assert "collapse" not in names(better), "a student that got better may be sure of itself, or brief"


def test_a_student_that_was_always_alike_has_not_collapsed():
    rows = [evaluation(-1, 0.5, validation_commonest=0.95), evaluation(9, 0.5, validation_commonest=0.95)]
    assert names(rows, Watched(100)) == []


@pytest.mark.parametrize(("rise", "fall", "found"), [(0.3, -0.08, True), (0.3, -0.06, False), (0.001, -0.08, False), (-0.3, -0.08, False)])
def test_reward_that_rises_while_accuracy_falls(rise: float, fall: float, found: bool):
    draw = random.Random(1)
    rows: list[Row] = [evaluation(-1, 0.5)]
    rows += [step(i, reward_expected=1 + rise * (i >= 20) + draw.gauss(0, 0.05)) for i in range(40)]
    rows.insert(21, evaluation(19, 0.6))
    rows.append(evaluation(39, 0.6 + fall, best=fall, since=0.1 + fall))
    told = [f for f in watch(rows, Watched(100)) if f.name == "reward without accuracy"]
    assert bool(told) == found
    if told:
        assert told[0].values["accuracy before"] == 0.6
        assert told[0].values["reward now"] == pytest.approx(1.3, abs=0.05)
        assert "judge.json" in told[0].advice
    assert "reward without accuracy" not in names(rows, Watched(100, rewarded=False)), "where no reward is used"


@pytest.mark.parametrize(("even", "found"), [(0.96, True), (0.94, False)])
def test_groups_without_a_difference(even: float, found: bool):
    rows = [step(i, zero_spread=even) for i in range(WINDOW)]
    assert ("nothing to reinforce" in names(rows)) == found
    assert names(rows[:-1]) == [], "as soon as the window is full"
    assert names(rows, Watched(60, rewarded=False)) == []


@pytest.mark.parametrize(
    ("end", "run", "figure"),
    [
        (evaluation(59, 0.55, since=0.05), RUN, None),
        (evaluation(59, 0.53, since=0.03), RUN, "since_start"),
        (evaluation(59, 0.53, since=0.03), Watched(61), None),
        (evaluation(59, 0.5, since=0.0, error=0.0), Watched(120), "since_start"),
        (evaluation(59, 0.5, since=0.0, error=0.0), Watched(121), None),
        (evaluation(59, 0.55, since_baseline=0.03, since_baseline_error=0.02), RUN, "since_baseline"),
        (evaluation(59, 0.55, since_baseline=0.04, since_baseline_error=0.02), RUN, None),
    ],
)
def test_what_is_no_gain(end: Row, run: Watched, figure: str | None):
    assert [f.figure for f in watch(run_of(step, end), run)] == ([figure] if figure else [])


def test_of_the_weights_that_are_kept():
    rows = run_of(step, evaluation(59, 0.5, since=0.0, best=-0.1))
    rows.insert(31, evaluation(29, 0.6, since=0.1))
    assert names(rows) == ["no gain"]
    assert names(rows, Watched(60, keep="best")) == []


def test_each_trouble_is_told_once_with_real_keys_of_a_recipe():
    draw = random.Random(0)
    wild = run_of(lambda i: step(i, kl=3 + math.cos(i / 2), reward_expected=1 + 0.01 * i + draw.gauss(0, 0.01)), evaluation(59, 0.1, since=-0.4, best=-0.4))
    wild.insert(41, evaluation(39, 0.2, since=-0.3, best=-0.3))
    even = [step(i, zero_spread=1.0) for i in range(WINDOW)]
    found = watch(wild, RUN) + watch(even, RUN) + watch(run_of(step, evaluation(59, 0.5, since=0.0, error=0.0)), RUN)
    assert {f.name for f in found} == {"oscillation", "collapse", "reward without accuracy", "nothing to reinforce", "no gain"}
    assert len([f for f in watch(wild, RUN) if f.name == "collapse"]) == 1
    values = recipe_values(build_recipe({"student": "s", "teachers": [{"model": "t"}], "data": {"train": "a", "validation": "b"}, "out": "o"}))
    for finding in found:
        for key in finding.settings:
            place: Any = values
            for name in key.split("."):
                assert name in place, f"{key} is no key of a recipe"
                place = place[name]
        assert any(key in finding.advice for key in finding.settings)
        assert finding.row()["values"] == finding.values
        assert "\n" not in str(finding)


def test_a_run_in_two_lives_finds_the_same():
    rows = run_of(lambda i: step(i, kl=3 + math.cos(i / 2)), evaluation(59, 0.1, since=-0.4))
    whole = watch(rows, RUN)
    assert len(whole) >= 2
    for cut in (10, 41, 55):
        first, told = Watch(RUN), list[Finding]()
        for row in rows[:cut]:
            told += first.add(row)
        second = Watch(RUN)
        for row in rows[:cut] + [finding.row() for finding in told]:
            second.add(row)
        for row in rows[cut:]:
            told += second.add(row)
        assert told == whole
