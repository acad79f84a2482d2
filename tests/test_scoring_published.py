"""Scores beside those of programs that people publish with: lmms-eval's relaxed accuracy, ANLS and exact match, MMMU's reading of a chosen option."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from masters.scoring import anls, chosen_letter, exact_match, relaxed_match

PUBLISHED = """
import json, random, sys
from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
from lmms_eval.tasks._task_utils.mmmu_mcq_utils import get_multi_choice_info, parse_mmmu_multi_choice_response
from lmms_eval.tasks.chartqa.utils import relaxed_correctness

asked = json.load(sys.stdin)
random.choice = lambda options: None  # where it finds no option it guesses one
json.dump({
    "relaxed": [float(relaxed_correctness(text, answer)) for text, answer in asked["relaxed"]],
    "anls": [float(anls([answer], [text])["anls"]) for text, answer in asked["anls"]],
    "exact": [float(exact_match_hf_evaluate([text], [answer], ignore_case=True)["exact_match"]) for text, answer in asked["exact"]],
    "choice": [parse_mmmu_multi_choice_response(text, *reversed(get_multi_choice_info(choices))) for text, choices in asked["choice"]],
}, sys.stdout)
"""
CHOICES = (("red circle", "blue square", "green line", "white"), ("12", "15", "20"), ("the heart", "a lung"))
SAID = (
    "{0}", "({0})", "{0}.", "{0}. {1}", "({0}) {1}", "Answer: {0}", "The answer is {0}.", "The answer is ({0}) {1}.", "The correct option is {0}",
    "It can be seen in the picture that it is {1}.",
)  # fmt: skip


def words(rng: random.Random) -> str:
    return " ".join("".join(rng.choice("abcde12") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3)))


def number(rng: random.Random) -> str:
    value = rng.choice([0, rng.randint(-200, 2000), round(rng.uniform(-5, 5), 2), round(rng.uniform(0, 100), 1)])
    return f"{value}{rng.choice(['', '', '%'])}"


def nearly(text: str, rng: random.Random) -> str:
    """`text` with some letters changed, dropped or doubled, and perhaps in capitals."""
    changed = "".join(rng.choice([letter, letter, letter, letter, "", letter * 2, rng.choice("abc")]) for letter in text)
    return " ".join(rng.choice([changed, changed.upper(), text, text.title()]).split())  # white space is not what is compared


def close(text: str, rng: random.Random) -> str:
    """The number `text` moved by a few per cent, around the 5% that are allowed."""
    value = float(text.rstrip("%")) * rng.choice([1, 1.02, 0.96, 1.0499, 1.0501, 0.9499, 0.9501, 2, -1])
    return f"{value:.6g}{rng.choice(['%' if text.endswith('%') else '', ''])}"


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Any]]:
    rng = random.Random(0)
    numbers, texts = [number(rng) for _ in range(400)], [words(rng) for _ in range(400)]
    pairs = [(nearly(text, rng) or "x", text) for text in texts]
    said = [(form.format(letter, option), choices) for choices in CHOICES for form in SAID for letter, option in zip("ABCD", choices, strict=False)]
    return {"relaxed": [(close(text, rng), text) for text in numbers] + pairs, "anls": [*pairs], "exact": [*pairs], "choice": [*said]}


@pytest.fixture(scope="module")
def published(asked: dict[str, list[Any]], lmms_eval: Path) -> dict[str, list[object]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(lmms_eval)])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PUBLISHED], input=json.dumps(asked), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[object]] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


@pytest.mark.parametrize(("metric", "score"), [("relaxed", relaxed_match), ("anls", anls), ("exact", exact_match)])
def test_scores_are_the_published_ones(metric: str, score: object, asked: dict[str, list[tuple[str, str]]], published: dict[str, list[float]]) -> None:
    assert callable(score)
    ours = [score(text, answer) for text, answer in asked[metric]]
    differing = [(pair, a, b) for pair, a, b in zip(asked[metric], ours, published[metric], strict=True) if a != pytest.approx(b)]
    assert not differing, differing[:5]
    assert min(ours) == 0 < max(ours) == 1, "pairs of both kinds"


def test_options_are_read_as_published(asked: dict[str, list[tuple[str, tuple[str, ...]]]], published: dict[str, list[str]]) -> None:
    differing = [(said, mine, theirs) for said, theirs in zip(asked["choice"], published["choice"], strict=True) if (mine := chosen_letter(*said)) != theirs]
    assert not differing, differing[:5]
    assert set(published["choice"]) == set("ABCD")
