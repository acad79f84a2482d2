"""Prompt lookup: what is guessed, and that an answer is the same with it and without, whatever chooses its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch_reference import picture

from masters.errors import RecipeError
from masters.runtime import Vlm
from masters.runtime.answer import Clock
from masters.runtime.graphs import OnnxParts
from masters.runtime.session import Chat
from masters.runtime.steps import LONGEST, SHORTEST, Steps, guess

QUESTION = "what colour is the shape?"


def by_hand(seen: list[int], most: int) -> list[int]:
    for size in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(seen) - size - 1, -1, -1):
            if seen[start : start + size] == seen[-size:]:
                return seen[start + size : start + size + most]
    return []


def test_a_guess_is_what_followed_the_last_time() -> None:
    assert guess(np.array([1, 2, 3, 4, 5, 9, 1, 2, 3]), 2) == [4, 5]
    assert guess(np.array([1, 2, 7, 1, 2, 8, 1, 2]), 9) == [8, 1, 2], "the last time, not the first"
    assert guess(np.array([0, 1, 2, 7, 5, 1, 2, 8, 0, 1, 2]), 1) == [7], "where more tokens agree"
    assert guess(np.array([4, 4, 4, 4]), 3) == [4]
    assert guess(np.array([1, 2, 3]), 3) == guess(np.array([1]), 3) == guess(np.array([1, 2, 1, 2]), 0) == []
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(500):
        seen = rng.integers(0, 4, rng.integers(1, 30))
        assert guess(seen, 4) == by_hand(seen.tolist(), 4)
        found += bool(guess(seen, 4))
    assert found > 100


class Counting:
    """Parts that count their runs."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.runs = parts, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts, name)

    def append(self, *inputs: Any) -> np.ndarray:
        self.runs += 1
        return np.asarray(self.parts.append(*inputs))

    def decode(self, *inputs: Any) -> np.ndarray:
        self.runs += 1
        return np.asarray(self.parts.decode(*inputs))


REPEATING = {"pattern": "((red|green), ){20}"}


@pytest.mark.parametrize("shared", [True, False], ids=["one shared buffer", "a growing cache"])
@pytest.mark.parametrize(
    "options",
    [{}, REPEATING, REPEATING | {"temperature": 0.7, "seed": 5}, {"choices": ["again and " * 8, "and again"]}],
    ids=["free", "repeating", "sampled", "one choice"],
)
def test_an_answer_is_the_same_by_lookup(options: dict[str, Any], shared: bool, vlm: Vlm) -> None:
    assert isinstance(vlm.parts, OnnxParts)
    before, vlm.parts.shared = vlm.parts.shared, shared
    try:
        plain = vlm.answer(QUESTION, [picture(1)], max_tokens=90, **options)
        for most in (1, 4, 16):
            counting = Counting(vlm.parts)
            looked = Vlm(vlm.manifest, vlm.folder, counting).answer(QUESTION, [picture(1)], max_tokens=90, lookup=most, **options)
            assert (looked.token_ids, looked.text, looked.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)
            assert counting.runs == len(plain.token_ids) - looked.guessed
            if "pattern" in options:
                assert looked.guessed > 0, "nothing was repeated: this shows nothing"
                assert looked.timings.decode_per_token == pytest.approx(np.mean(looked.timings.decode_steps))
    finally:
        vlm.parts.shared = before


def test_logits_are_those_of_single_steps(vlm: Vlm) -> None:
    """An answer that quotes its prompt, strays, and quotes again."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(40, 400, 80)
    said = [int(token) for token in (*prompt[20:35], *rng.integers(40, 400, 3), *prompt[50:70])]
    found = []
    for ahead in (0, 6):
        chat = Chat(vlm)
        chat._prefill(prompt, [], len(prompt) + len(said), Clock())
        steps = Steps(vlm.parts, chat.context, prompt, len(said), ahead)
        found.append([steps.after(said[:count]).copy() for count in range(1, len(said) + 1)])
        np.testing.assert_array_equal(chat.context.keys, [*prompt, *said])
    assert steps.guessed > 25
    for single, several in zip(*found, strict=True):
        np.testing.assert_allclose(single, several, atol=1e-3)


def test_a_chat_goes_on_after_guesses(vlm: Vlm) -> None:
    """Guesses that came too late are not taken for what was said."""
    said = []
    for most in (0, 8):
        chat = vlm.chat()
        turns = [chat.answer(question, max_tokens=21, lookup=most, pattern="((red|green), ){12}") for question in ("what is it?", "and this?", "what is it?")]
        said.append([turn.token_ids for turn in turns])
    assert said[0] == said[1]


def test_a_negative_lookup_is_refused(vlm: Vlm) -> None:
    with pytest.raises(RecipeError, match="lookup is -1; expected 0"):
        vlm.stream("hi", lookup=-1)
    with pytest.raises(TypeError, match="unknown option 'look_up'; expected some of max_tokens"):
        vlm.stream("hi", look_up=3)  # type: ignore[call-arg]
