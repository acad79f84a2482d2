"""Several questions at once: the answers of each alone, in order, however many are written together."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from torch_reference import picture

from masters.errors import ImageError, RecipeError
from masters.runtime import Vlm
from masters.runtime.graphs import OnnxParts

COUNT = 9
WORDS = "what colour is it, please? "


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, list[Any]]]:
    """Of different lengths, with none, one and two pictures of different sizes."""
    return [(WORDS * (1 + number % 4), [picture(number + i, 40 + 20 * number, 90) for i in range(number % 3)]) for number in range(COUNT)]


@pytest.mark.parametrize("at_once", [1, 2, 4, 16])
def test_together_as_alone(at_once: int, questions: list[tuple[str, list[Any]]], vlm: Vlm) -> None:
    for options in ({"max_tokens": 12}, {"max_tokens": 7, "temperature": 1.0, "seed": 3}):
        alone = [vlm.answer(question, images, system="Be brief.", **options) for question, images in questions]
        together = list(vlm.answer_batch(questions, system="Be brief.", at_once=at_once, **options))
        for ours, theirs in zip(together, alone, strict=True):
            assert (ours.token_ids, ours.text, ours.finish_reason, ours.prompt_tokens) == (
                theirs.token_ids,
                theirs.text,
                theirs.finish_reason,
                theirs.prompt_tokens,
            )
        assert len({answer.token_ids for answer in alone}) > 3


def test_answers_of_different_lengths_and_values(questions: list[tuple[str, list[Any]]], vlm: Vlm) -> None:
    """A constraint ends answers at different steps; rows change hands."""
    schema = {"type": "array", "items": {"enum": ["a", "bc", 7]}, "minItems": 1, "maxItems": 6}
    options: dict[str, Any] = {"json_schema": schema, "temperature": 2.0, "seed": 1, "max_tokens": 80}
    alone = [vlm.answer(question, images, **options).text for question, images in questions]
    together = list(vlm.answer_batch(iter(questions), at_once=3, **options))
    assert [answer.text for answer in together] == alone
    assert len({len(answer.token_ids) for answer in together}) > 3
    for answer in together:
        jsonschema.validate(json.loads(answer.text), schema)
        assert len(answer.timings.decode_steps) == len(answer.token_ids) - 1
        assert answer.timings.first_token + sum(answer.timings.decode_steps) == pytest.approx(answer.timings.total, abs=5)


def test_answers_come_before_all_questions_are_read(questions: list[tuple[str, list[Any]]], vlm: Vlm) -> None:
    taken = []

    def asked() -> Any:
        for number, question in enumerate(questions):
            taken.append(number)
            yield question

    answers = vlm.answer_batch(asked(), at_once=2, max_tokens=3)
    next(answers)
    assert len(taken) < COUNT
    assert len(list(answers)) == COUNT - 1
    assert list(vlm.answer_batch([], at_once=2)) == []


def test_a_bundle_without_a_shared_cache_answers_one_by_one(questions: list[tuple[str, list[Any]]], vlm: Vlm) -> None:
    assert isinstance(vlm.parts, OnnxParts)
    expected = [answer.token_ids for answer in vlm.answer_batch(questions[:3], max_tokens=5)]
    vlm.parts.shared = False
    try:
        assert [answer.token_ids for answer in vlm.answer_batch(questions[:3], max_tokens=5)] == expected
    finally:
        vlm.parts.shared = True


def test_what_can_not_be_answered_is_named(vlm: Vlm) -> None:
    with pytest.raises(ImageError, match="no image file"):
        list(vlm.answer_batch([("hi", []), ("hi", ["missing.png"])], max_tokens=2))
    with pytest.raises(RecipeError, match="at_once is 0"):
        vlm.answer_batch([("hi", [])], at_once=0)
