"""Rewards and advantages against a plain loop over all G responses, repetitions written out."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from masters.distill.objective import RowStats
from masters.distill.recipe import Objective
from masters.distill.responses import DistinctResponse
from masters.distill.rewards import advantages, distillation_reward, minmax, outranking, total_reward
from masters.distill.train import shape_rewards

NAN = float("nan")


def plain_group(rows: list[dict[str, float]], kind: str, least: float, accuracy: bool, wrong: bool, positive: bool) -> list[tuple[float, float, float]]:
    """R_distill, R and A of each of the G responses, by the formulas of the paper, one response at a time; a verdict is 1, 0 or None."""
    source = [-row["divergence"] if kind == "jsd_minmax" else row["teacher_logprob"] for row in rows]
    totals, parts = [], []
    for row, value in zip(rows, source, strict=True):
        part = 0.0
        if kind != "none" and max(source) - min(source) > least:
            part = (value - min(source)) / (max(source) - min(source))
        parts.append(part)
        if not wrong and row["verdict"] == 0:
            part = 0.0
        known = [r["verdict"] for r in rows if r["verdict"] is not None]
        verdict = row["verdict"] if row["verdict"] is not None else statistics.fmean(known) if known else 0.0
        totals.append(part + (verdict if accuracy else 0.0))
    mean = sum(totals) / len(totals)
    deviation = statistics.stdev(totals) if len(totals) > 1 else 0.0
    found = [(total - mean) / (deviation + 1e-4) if len(totals) > 1 else 0.0 for total in totals]
    return [(p, t, max(a, 0.0) if positive else a) for p, t, a in zip(parts, totals, found, strict=True)]


@pytest.mark.parametrize("kind", ["jsd_minmax", "teacher_logprob", "none"])
@pytest.mark.parametrize("accuracy", [True, False])
@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("which", ["all", "positive"])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_a_batch_of_groups_equals_the_plain_loop(kind: str, accuracy: bool, wrong: bool, which: str, least: float):
    rng = random.Random(f"{kind}{accuracy}{wrong}{which}{least}")
    objective = Objective(distillation_reward=kind, accuracy_reward=accuracy, reward_wrong=wrong, advantages=which, least_spread=least)
    groups, rows = [], []
    for _ in range(12):
        size = rng.randint(1, 5)
        group = [DistinctResponse((j,), rng.randint(1, 4), rng.choice([1.0, 0.0, None]), rng.random() < 0.5, False) for j in range(size)]
        groups.append(group)
        rows.append([{"divergence": rng.random() * 0.6, "teacher_logprob": -3 * rng.random(), "verdict": r.verdict} for r in group])
    flat = [row for group in rows for row in group]
    zero = torch.zeros(len(flat))
    stats = RowStats(*(torch.tensor([r["divergence"] for r in flat]), zero, zero, zero, torch.tensor([r["teacher_logprob"] for r in flat]), zero))
    shaped = shape_rewards(groups, stats, objective)
    place = 0
    for group, values in zip(groups, rows, strict=True):
        written_out = [row for response, row in zip(group, values, strict=True) for _ in range(response.count)]
        reference = iter(plain_group(written_out, kind, least, accuracy, wrong, which == "positive"))
        total = sum(r.count for r in group)
        weights = 0.0
        for response in group:
            repeated = [next(reference) for _ in range(response.count)]
            assert len(set(repeated)) == 1, "equal responses fare equally"
            _, reward, advantage = repeated[0]
            assert float(shaped.total[place]) == pytest.approx(reward, abs=1e-6)
            assert float(shaped.advantage[place]) == pytest.approx(advantage, abs=2e-3 if abs(advantage) < 0.01 else 2e-5)
            assert float(shaped.weights[place]) == pytest.approx(response.count / total / len(groups))
            weights += float(shaped.weights[place])
            place += 1
        assert weights == pytest.approx(1 / len(groups)), "every question weighs the same"


def test_the_closest_response_gets_one_and_the_farthest_nothing():
    found = distillation_reward("jsd_minmax", torch.tensor([0.30, 0.10, 0.20]), torch.zeros(3))
    assert found.tolist() == pytest.approx([0.0, 1.0, 0.5])
    likely = distillation_reward("teacher_logprob", torch.zeros(3), torch.tensor([-0.5, -2.5, -1.0]))
    assert likely.tolist() == pytest.approx([1.0, 0.0, 0.75])


def test_equal_divergences_reward_nobody():
    assert minmax(torch.full((4,), 0.37)).tolist() == [0.0] * 4
    assert minmax(torch.tensor([0.2])).tolist() == [0.0], "one response has no spread"
    assert minmax(torch.zeros(3)).tolist() == [0.0] * 3


def test_a_spread_of_rounding_errors_is_not_blown_up():
    nearly = torch.tensor([0.30000, 0.30002, 0.30001])
    assert minmax(nearly).max() == 1, "min-max alone blows it up"
    assert minmax(nearly, least_spread=1e-3).tolist() == [0.0] * 3
    assert minmax(torch.tensor([0.3, 0.4]), least_spread=0.05).tolist() == [0.0, 1.0]


def test_a_missing_verdict_is_neither_right_nor_wrong():
    verdicts, part = torch.tensor([1.0, 0.0, NAN]), torch.tensor([0.5, 0.6, 0.7])
    assert total_reward(verdicts, part, True, True).tolist() == pytest.approx([1.5, 0.6, 1.2]), "at the mean of the others' verdicts"
    assert total_reward(verdicts, part, True, False).tolist() == pytest.approx([1.5, 0.0, 1.2])
    assert total_reward(torch.full((3,), NAN), part, True, True).tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert total_reward(verdicts, part, False, True).tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert total_reward(verdicts, part, False, False).tolist() == pytest.approx([0.5, 0.0, 0.7])


@pytest.mark.parametrize("counts", [[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 2.0, 1.0]])
def test_a_response_without_a_verdict_is_neither_raised_nor_lowered_by_the_others(counts: list[float]):
    verdicts, times = torch.tensor([1.0, 0.0, 0.0, NAN]), torch.tensor(counts)
    found = advantages(total_reward(verdicts, torch.zeros(4), True, True, times), times)
    assert float(found[3]) == pytest.approx(0.0, abs=1e-6)
    assert found[0] > 0 > found[1]
    alone = advantages(total_reward(verdicts[:3], torch.zeros(3), True, True, times[:3]), times[:3])
    assert torch.equal(found[:3].sign(), alone.sign())


def test_advantages_of_equal_rewards_vanish():
    for value in (0.0, 0.1, 1.7):
        found = advantages(torch.full((3,), value), torch.tensor([1.0, 3.0, 4.0]))
        assert found.abs().max() < 1e-2, "rounding divided by the epsilon stays small"
    assert advantages(torch.tensor([5.0]), torch.tensor([8.0])).abs().max() == 0
    assert advantages(torch.tensor([5.0]), torch.tensor([1.0])).tolist() == [0.0], "a group of one has none"


def test_counts_weigh_like_repetitions():
    rewards, counts = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0])
    written_out = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(4))
    assert advantages(rewards, counts).tolist() == pytest.approx(written_out[:2].tolist())
    assert written_out.tolist() == pytest.approx([1.5 * s for s in (1, -1 / 3, -1 / 3, -1 / 3)], rel=1e-3)
    assert (counts * advantages(rewards, counts)).sum() == pytest.approx(0, abs=1e-6)
    assert advantages(rewards, counts, "positive").tolist() == pytest.approx([1.5, 0.0], rel=1e-3)


def test_outranking_counts_pairs_and_ties_are_not_wins():
    verdicts, rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, NAN]), torch.tensor([0.9, 0.4, 0.4, 0.1, 2.0])
    pairs = [(r, w) for r in (0.9, 0.4) for w in (0.4, 0.1)]
    assert outranking(verdicts, rewards) == (sum(r > w for r, w in pairs), len(pairs)) == (3, 4)
    assert outranking(torch.ones(3), rewards[:3]) == (0, 0), "a group that is all right has no pairs"
    assert outranking(torch.tensor([NAN, NAN]), rewards[:2]) == (0, 0)


def test_where_the_divergence_is_taken():
    group = [DistinctResponse((0,), 1, 1.0, False, False), DistinctResponse((1,), 2, 0.0, True, False), DistinctResponse((2,), 1, None, True, False)]
    stats = RowStats(*(torch.rand(3) for _ in range(6)))
    expected = {"all": [1, 1, 1], "teacher": [0, 1, 1], "right": [1, 0, 0]}
    for which, rows in expected.items():
        assert shape_rewards([group], stats, Objective(distill_on=which)).distill_on.tolist() == rows


def test_share_of_groups_without_spread():
    same = [DistinctResponse((j,), 1, 1.0, True, False) for j in range(3)]
    mixed = [DistinctResponse((j,), 1, float(j % 2), True, False) for j in range(3)]
    stats = RowStats(*(torch.rand(6) for _ in range(6)))
    assert shape_rewards([same, mixed], stats, Objective(distillation_reward="none")).zero_spread == 0.5
    assert math.isclose(shape_rewards([same, mixed], stats, Objective()).zero_spread, 0.0)
