"""judge.json: agreement against scikit-learn's and a regression's figures, and planted bad judges, each of which it must accuse; a good one it must not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from masters.distill.agreement import Judged, describe, distinct_pairs, figures, judged, kappa_of, length_correlation, question_sums, write_agreement
from masters.distill.responses import Response
from masters.samples import Sample

Decide = Callable[[random.Random, int, int], float | None]  # from the rules' verdict and the length in words


def rows_of(decide: Decide, questions: int = 100, seed: int = 1) -> list[Judged]:
    """Four answers of 1 to 20 words to each question, 40% right whatever their length, and what a judge makes of them."""
    draw, found = random.Random(seed), []
    for number in range(questions):
        sample = Sample(f"q{number}", (), f"question {number}?", ("teal",))
        for place in range(4):
            words, rules = draw.randint(1, 20), int(draw.random() < 0.4)
            text = " ".join(f"w{place}{i}" for i in range(words))
            source, ratio = ("teacher", 0.2) if place < 2 else ("student", 0.0)
            found.append(Judged(sample, source, ratio, text, decide(draw, rules, words), "because", float(rules), True))
    return found


def good(draw: random.Random, rules: int, words: int) -> float:
    return float(rules if draw.random() < 0.95 else 1 - rules)


def likes_long(draw: random.Random, rules: int, words: int) -> float:
    return float(rules if draw.random() < 0.7 else words > 10)


def names_of(rows: list[Judged]) -> list[str]:
    return [flag["name"] for flag in describe(rows)["flags"]]


@pytest.mark.parametrize(
    ("decide", "name"),
    [
        (likes_long, "likes long answers"),
        (lambda draw, rules, words: float(rules if draw.random() < 0.7 else words < 10), "likes short answers"),
        (lambda draw, rules, words: 1.0, "says yes"),
        (lambda draw, rules, words: 0.0, "says no"),
        (lambda draw, rules, words: float(draw.random() < 0.5), "disagrees"),
        (lambda draw, rules, words: None if draw.random() < 0.2 else float(rules), "nulls"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_planted_bad_judge_is_flagged(decide: Decide, name: str, seed: int):
    assert name in names_of(rows_of(decide, seed=seed))


@pytest.mark.parametrize("seed", range(6))
def test_a_good_judge_is_not(seed: int):
    assert names_of(rows_of(good, seed=seed)) == []
    assert names_of(rows_of(lambda draw, rules, words: float(rules), seed=seed)) == []


def test_right_answers_that_are_longer_are_no_bias():
    """Length goes with being right here, and the judge agrees with the rules: no length beyond that."""

    def long_if_right(row: Judged) -> Judged:
        words = row.words + (20 if row.rules else 0)
        return Judged(row.sample, row.source, row.ratio, " ".join([row.text, *["more"] * (words - row.words)]), row.verdict, "", row.rules, True)

    rows = [long_if_right(row) for row in rows_of(good)]
    assert np.corrcoef([row.verdict or 0 for row in rows], [row.words for row in rows])[0, 1] > 0.5, "verdict and length go together"
    assert names_of(rows) == []


def test_a_few_answers_accuse_nobody():
    assert names_of(rows_of(lambda draw, rules, words: 1.0, questions=5)) == []


@pytest.mark.parametrize("decide", [good, likes_long])
def test_kappa_and_partial_correlation_agree_with_other_implementations(decide: Decide):
    metrics = pytest.importorskip("sklearn.metrics")
    rows = rows_of(decide)
    verdicts, rules = (np.array([float(value or 0) for value in values]) for values in ([r.verdict for r in rows], [r.rules for r in rows]))
    sums = question_sums(rows).sum(0)
    assert float(kappa_of(sums)) == pytest.approx(metrics.cohen_kappa_score(verdicts, rules), abs=1e-12)
    design, lengths = np.stack([np.ones_like(rules), rules], 1), np.log1p([row.words for row in rows])
    left, right = (values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (verdicts, lengths))
    assert float(length_correlation(sums)) == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-9)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """The partial correlation is 0 by construction: 95% intervals leave it out in about 5% of draws."""
    intervals = [figures(rows_of(good, questions=60, seed=seed))["length"] for seed in range(30)]
    assert sum(found is not None and found.excludes_zero() for found in intervals) <= 5


def test_kappa_by_hand():
    # Right/right 20, rules right alone 5, judge alone 10, wrong/wrong 15: agreement .7 where chance gives .5.
    sums = np.array([[25.0, 10, 0, 0, 0], [25.0, 20, 0, 0, 0]])
    assert float(kappa_of(sums)) == pytest.approx(0.4)
    assert np.isnan(kappa_of(np.array([[0.0] * 5, [7.0, 7, 0, 0, 0]]))), "two judges who only ever say yes"


def test_the_shares_and_the_disagreements_to_read():
    rows = rows_of(lambda draw, rules, words: None if words == 7 else float(words > 3))
    found = describe(rows)
    for key, groups in {"positives_by_source": ["student", "teacher"], "positives_by_ratio": ["student 0", "teacher 0.2"]}.items():
        assert sorted(found[key]) == groups
        assert sum(group["answers"] for group in found[key].values()) == len(rows) == found["answers"]
    words = found["positives_by_words"]
    assert list(words) == ["1", "2 to 3", "4 to 7", "8 to 15", "16 to 31"]
    assert words["2 to 3"]["positive"] == 0
    assert words["8 to 15"]["positive"] == 1
    assert found["null_rate"] == pytest.approx(words["4 to 7"]["null"] / len(rows))
    differ = [row for row in distinct_pairs(rows) if row.verdict != row.rules]
    assert found["disagreements"]["count"] == len(differ) > 50
    assert len(found["disagreements"]["to_read"]) == 50
    assert all(row["verdict"] != row["rules"] and row["truth"] == ["teal"] for row in found["disagreements"]["to_read"])
    assert len({row["source"] for row in found["disagreements"]["to_read"]}) == 2


def test_rows_of_a_run_become_judge_json(tmp_path: Path):
    sample = Sample("a", (), "which colour?", ("teal",))

    def row(text: str, verdict: float | None, finish: str = "stop") -> Response:
        return Response("a", "teacher", "t", 0.2, 0, text, (1,), finish, verdict, "me", "why")

    rows = [row("teal", 1.0), row("teal", 1.0), row("it is teal", 1.0), row("", 0.0), row("red", None), row("", None, "failed")]
    write_agreement(tmp_path / "judge.json", judged(rows, [sample]), "model")
    found = json.loads((tmp_path / "judge.json").read_text())
    assert (found["answers"], found["asked"], found["compared"]) == (5, 4, 2), "what failed is no answer, an empty one is not asked about"
    assert found["null_rate"] == 0.25
    assert [row["answer"] for row in found["disagreements"]["to_read"]] == ["it is teal"]
    write_agreement(tmp_path / "judge.json", [], "rules")
    assert json.loads((tmp_path / "judge.json").read_text())["answers"] == 0
