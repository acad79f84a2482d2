"""Answers against transformers' generate, and what a session promises: streams, chats, cancelling, limits."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_reference import Torch, picture

from masters.errors import BundleError, DataError, ImageError, RecipeError
from masters.runtime import Vlm
from masters.runtime.chat import user_message
from masters.runtime.graphs import OnnxParts
from masters.runtime.memory import peak_rss_mb
from masters.runtime.session import Context, Picture, common_prefix, prompt_keys

QUESTION = "what colour is the shape?"


@pytest.fixture(params=["one shared buffer", "a growing cache"])
def either_cache(request: pytest.FixtureRequest, vlm: Vlm) -> Iterator[Vlm]:
    """The same graph with both kinds of cache."""
    assert isinstance(vlm.parts, OnnxParts)
    assert vlm.parts.shared
    vlm.parts.shared = request.param == "one shared buffer"
    yield vlm
    vlm.parts.shared = True


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_greedy_tokens_equal_generate(count: int, either_cache: Vlm, pytorch: Torch) -> None:
    images = [picture(seed, 40 + 30 * seed, 90) for seed in range(count)]
    expected = pytorch.generate(QUESTION, images)
    answer = either_cache.answer(QUESTION, images, max_tokens=24)
    assert list(answer.token_ids) == expected
    assert len(set(expected)) > 3, "the model says the same thing over and over: this shows nothing"
    assert answer.prompt_tokens == pytorch.inputs([user_message(QUESTION, count)], images)["input_ids"].shape[1]


def test_a_batch_of_questions(vlm: Vlm, pytorch: Torch) -> None:
    questions = ["what shape is it?", "is it red?", "read the digits.", "how many digits are there?", "what is the colour of the circle, please?"]
    expected = [pytorch.generate(question, [picture(i)], tokens=8) for i, question in enumerate(questions)]
    found = [list(vlm.answer(question, [picture(i)], max_tokens=8).token_ids) for i, question in enumerate(questions)]
    assert found == expected
    assert len(set(map(tuple, found))) > 1


def test_logits_equal_pytorch(either_cache: Vlm, pytorch: Torch) -> None:
    images = [picture(5), picture(6, 90, 30)]
    messages = [user_message(QUESTION, 2)]
    theirs = pytorch.logits(messages, images)
    ours = first_logits(either_cache, messages, images)
    largest = float(np.abs(ours - theirs).max())
    assert largest < 1e-3, f"largest difference of a logit {largest}"
    assert np.ptp(theirs) > 1


def test_repetition_penalty_counts_the_prompt_as_generate_does(vlm: Vlm, pytorch: Torch) -> None:
    changed = 0
    for penalty in (0.5, 2.5):  # below 1 what was seen is favoured, the prompt's own words included
        expected = pytorch.generate(QUESTION, [picture(2)], repetition_penalty=penalty)
        assert list(vlm.answer(QUESTION, [picture(2)], max_tokens=24, repetition_penalty=penalty).token_ids) == expected
        changed += expected != pytorch.generate(QUESTION, [picture(2)])
    assert changed


def test_pieces_of_a_stream_make_the_answer(vlm: Vlm) -> None:
    stream = vlm.stream(QUESTION, [picture(1)], max_tokens=24)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text
    assert len(pieces) > 3
    whole = vlm.format.tokenizer.decode(list(stream.answer.token_ids)).lstrip()
    assert stream.answer.text.rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert stream.answer == dataclasses.replace(vlm.answer(QUESTION, [picture(1)], max_tokens=24), timings=stream.answer.timings)


def test_a_seed_repeats_and_temperature_varies(vlm: Vlm) -> None:
    def ask(seed: int, temperature: float = 1.5) -> tuple[int, ...]:
        return vlm.answer(QUESTION, [picture(1)], temperature=temperature, top_p=0.95, top_k=50, seed=seed, max_tokens=12).token_ids

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1
    assert (
        vlm.answer(QUESTION, [picture(1)], greedy=True, temperature=2.0, max_tokens=12).token_ids == vlm.answer(QUESTION, [picture(1)], max_tokens=12).token_ids
    )


def test_an_end_token_ends_the_answer_and_stays_out_of_the_text(vlm: Vlm) -> None:
    free = vlm.answer(QUESTION, [picture(1)], max_tokens=24)
    end = free.token_ids[6]
    assert free.finish_reason == "length"
    ending = Vlm(dataclasses.replace(vlm.manifest, generation={**vlm.manifest.generation, "eos_token_ids": [end]}), vlm.folder, vlm.parts)
    answer = ending.answer(QUESTION, [picture(1)], max_tokens=24)
    assert answer.finish_reason == "stop"
    first = free.token_ids.index(end)
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.text == vlm.format.tokenizer.decode(list(free.token_ids[:first])).lstrip().rstrip("\ufffd")


def test_a_stop_string_ends_the_answer(vlm: Vlm) -> None:
    free = vlm.answer(QUESTION, [picture(1)], max_tokens=24)
    stop = free.text[8:11]
    answer = vlm.answer(QUESTION, [picture(1)], max_tokens=24, stop=[stop, "never said"])
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
    assert len(answer.token_ids) < len(free.token_ids)
    assert vlm.answer(QUESTION, [picture(1)], max_tokens=24, stop=stop).text == answer.text


def test_cancel_from_another_thread(vlm: Vlm) -> None:
    stream = vlm.stream(QUESTION, [picture(1)], max_tokens=300, temperature=1.0, seed=0)
    tokens = 0
    for _ in stream:
        tokens += 1
        if tokens == 3:
            canceller = threading.Thread(target=stream.cancel)
            canceller.start()
            canceller.join()
    assert stream.answer.finish_reason == "cancelled"
    assert tokens <= 4


def test_threads_share_a_model(vlm: Vlm) -> None:
    """Interleaved streams give the answers that each gives alone."""
    alone = [vlm.answer(QUESTION, [picture(seed)], max_tokens=16).token_ids for seed in range(4)]
    streams = [vlm.stream(QUESTION, [picture(seed)], max_tokens=16) for seed in range(4)]
    for _ in range(4):
        for stream in streams:
            next(stream, None)
    found: dict[int, tuple[int, ...]] = {}
    workers = [threading.Thread(target=lambda i=i: found.update({i: streams[i].answer.token_ids})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[i] for i in range(4)] == alone


def test_timings_add_up(vlm: Vlm) -> None:
    timings = vlm.answer(QUESTION, [picture(1)], max_tokens=6).timings
    assert timings.image_preprocess > 0
    assert timings.image_encode > 0
    assert timings.image_preprocess + timings.image_encode + timings.prefill <= timings.first_token < timings.total
    assert len(timings.decode_steps) == 5
    assert timings.first_token + sum(timings.decode_steps) <= timings.total
    assert timings.decode_per_token == np.median(timings.decode_steps)
    assert timings.peak_memory_mb == pytest.approx(peak_rss_mb(), abs=50)
    assert vlm.answer(QUESTION, max_tokens=1).timings.decode_per_token is None


def test_a_chat_answers_as_if_it_had_read_everything_at_once(either_cache: Vlm, pytorch: Torch) -> None:
    chat = either_cache.chat(system="Be brief.")
    turns = [("what colour is it?", [picture(1)]), ("and the shape?", []), ("is this one larger?", [picture(2, 70, 70)])]
    images: list[Any] = []
    for question, shown in turns:
        images += shown
        before = len(chat.context.keys)
        answer = chat.answer(question, shown, max_tokens=10)
        messages = chat.messages[:-1]
        assert answer.prompt_tokens == pytorch.inputs(messages, images)["input_ids"].shape[1]
        cold = first_logits(either_cache, messages, images)
        np.testing.assert_allclose(cold, pytorch.logits(messages, images), atol=2e-3)
        assert answer.token_ids[0] == int(np.argmax(cold))
        assert len(chat.context.keys) >= before
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]


class Counting:
    """Parts that count what they are asked to do."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.encoded = parts, 0
        self.positions: list[int] = []
        self.seen: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts, name)

    def encode_images(self, pixels: Any) -> np.ndarray:
        self.encoded += 1
        return self.parts.encode_images(pixels)

    def decode(self, embeds: np.ndarray, cache: Any, *positions: Any) -> np.ndarray:
        self.positions.append(len(embeds))
        logits = self.parts.decode(embeds, cache, *positions)
        self.seen.append(logits)
        return logits


def test_a_chat_computes_only_what_is_new(vlm: Vlm) -> None:
    counting = Counting(vlm.parts)
    chat = Vlm(vlm.manifest, vlm.folder, counting).chat()
    first = chat.answer("what colour is it?", [picture(1)], max_tokens=4)
    assert counting.positions == [first.prompt_tokens, 1, 1, 1]
    counting.positions.clear()
    counting.seen.clear()
    second = chat.answer("and the shape?", max_tokens=1)
    assert counting.encoded == 1, "an image was encoded again"
    assert counting.positions[0] <= second.prompt_tokens - first.prompt_tokens, "the earlier turn's prompt was computed again"
    cold = first_logits(vlm, chat.messages[:-1], [picture(1)])
    np.testing.assert_allclose(counting.seen[0], cold, atol=1e-3)


def test_a_failed_turn_leaves_the_chat_as_it_was(vlm: Vlm) -> None:
    chat = vlm.chat()
    chat.answer("what colour is it?", [picture(1)], max_tokens=4)
    before = list(chat.messages)
    with pytest.raises(ImageError):
        chat.answer("and this?", [b"no image"], max_tokens=4)
    dropped = chat.stream("and the shape?", [picture(2)], max_tokens=20)
    next(dropped)
    dropped._pieces.close()
    assert chat.messages == before
    assert len(chat.pictures) == 1
    # Another image in the place of the dropped one: its features must not be taken from the cache.
    retried = chat.answer("and the shape?", [picture(3)], max_tokens=1)
    cold = first_logits(vlm, chat.messages[:-1], [picture(1), picture(3)])
    assert retried.token_ids[0] == int(np.argmax(cold))


def test_a_prompt_beyond_the_context_is_refused(vlm: Vlm) -> None:
    with pytest.raises(DataError, match="the model takes 512 in all"):
        vlm.answer("what is it? " * 300)
    small = Vlm(dataclasses.replace(vlm.manifest, decoder=dataclasses.replace(vlm.manifest.decoder, context=20)), vlm.folder, vlm.parts)
    answer = small.answer("hi", max_tokens=64)
    assert answer.prompt_tokens + len(answer.token_ids) == 20
    assert answer.finish_reason == "length"


def test_bad_questions_and_options_are_named(vlm: Vlm) -> None:
    with pytest.raises(DataError, match="'<image>' marks"):
        vlm.answer("what is <image>?", [picture(1)])
    with pytest.raises(RecipeError, match="max_tokens is 0"):
        vlm.answer("hi", max_tokens=0)
    with pytest.raises(RecipeError, match="temperature is -1"):
        vlm.stream("hi", temperature=-1)
    with pytest.raises(ImageError, match="no image file at"):
        vlm.answer("hi", [Path("missing.png")])


def test_an_unknown_family_and_missing_ids_are_named(vlm: Vlm) -> None:
    with pytest.raises(BundleError, match=r"knows idefics3, .*smolvlm"):
        Vlm(dataclasses.replace(vlm.manifest, model_type="moondream"), vlm.folder, vlm.parts)
    with pytest.raises(BundleError, match=r"model_type is '\.\./chat'"):
        Vlm(dataclasses.replace(vlm.manifest, model_type="../chat"), vlm.folder, vlm.parts)
    with pytest.raises(BundleError, match=r"lacks generation\.eos_token_ids"):
        Vlm(dataclasses.replace(vlm.manifest, generation={"image_token_id": 4}), vlm.folder, vlm.parts)


def test_features_that_do_not_fill_the_image_tokens_are_refused() -> None:
    ids = np.array([1, 4, 4, 4, 2])
    features = np.zeros((2, 8), np.float32)
    with pytest.raises(BundleError, match="2 features for 3 image tokens"):
        prompt_keys(ids, [Picture(-7, (0, 0), features)], image_token=4)
    keys = prompt_keys(ids, [Picture(-7, (0, 0), features), Picture(-8, (0, 0), features[:1])], image_token=4)
    assert keys.tolist() == [1, -7, -7, -8, 2]


def test_common_prefix() -> None:
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_prefix(Context().keys, np.array([1])) == 0


def test_an_answer_has_a_json_form(vlm: Vlm) -> None:
    answer = vlm.answer("hi", max_tokens=2)
    assert json.loads(json.dumps(dataclasses.asdict(answer)))["timings"]["total"] == answer.timings.total


def first_logits(vlm: Vlm, messages: Any, images: Any) -> np.ndarray:
    """Logits after a prompt, everything computed from nothing, through the engine's calls alone."""
    seen = vlm.see(images)
    ids = vlm.prompt_ids(messages, [pixels.grids[0] for pixels in seen])
    embeds = vlm.parts.embed(ids).copy()
    if seen:
        embeds[ids == vlm.manifest.generation["image_token_id"]] = np.concatenate([vlm.parts.encode_images(pixels) for pixels in seen])
    return vlm.parts.decode(embeds, vlm.parts.new_cache(len(ids)))
