"""Several questions at once, and answers by prompt lookup, on bundles of the other families: positions in planes, tiles, features of middle layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from masters.export.awkward import awkward_images
from masters.export.parity import QUESTIONS
from masters.runtime import Vlm, load

TILES, PLANES = ("smolvlm", "internvl", "llava_onevision"), ("qwen2_5_vl", "qwen3_vl")
Bundles = Callable[[str, str], Path]


@pytest.fixture(params=[*TILES, *PLANES])
def vlm(request: pytest.FixtureRequest) -> Vlm:
    bundles: Bundles = request.getfixturevalue("family_bundle" if request.param in TILES else "qwen_bundle")
    return load(bundles(request.param, "fp32"), threads=1)


def test_together_as_alone(vlm: Vlm) -> None:
    """Different questions, lengths and counts of pictures side by side, in rows that change hands."""
    images = awkward_images()
    shown = [[images["plain"]], [], [images["rotated"], images["grey"]], [images["thin"]], [images["alpha"]], []]
    questions = [(f"{QUESTIONS[number % len(QUESTIONS)]} {'Look closely. ' * number}", images) for number, images in enumerate(shown)]
    alone = [vlm.answer(question, images, max_tokens=9) for question, images in questions]
    together = list(vlm.answer_batch(questions, at_once=3, max_tokens=9))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.token_ids for answer in alone}) > 3, "all questions get one answer: nothing would be shown"


def test_a_guessed_answer_is_the_answer(vlm: Vlm) -> None:
    """Two words over and over, in an order that the model chooses: much of it is guessed right."""
    ask = {"max_tokens": 90, "pattern": "((red|green), ){20}"}
    plain = vlm.answer(QUESTIONS[0], [awkward_images()["plain"]], **ask)  # type: ignore[arg-type]
    looked = vlm.answer(QUESTIONS[0], [awkward_images()["plain"]], lookup=6, **ask)  # type: ignore[arg-type]
    assert looked.token_ids == plain.token_ids
    assert looked.guessed > 0
    assert plain.guessed == 0
