"""Whole conversations at once, several answers to one prompt, remembered images, log-probabilities: what a server asks of a session."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch_reference import picture

from masters.errors import DataError, ImageError
from masters.runtime import Vlm
from masters.runtime.chat import user_message
from masters.runtime.detokenize import TokenBytes
from masters.runtime.graphs import OnnxParts
from masters.runtime.pictures import PictureMemory, new_picture
from masters.runtime.sampling import Sampling, choose, rank
from masters.runtime.session import Context, Options

QUESTION = "what colour is the shape?"


class Counting:
    """Parts that count the images they encode and the positions they decode, and may do something first."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.encoded, self.positions = parts, 0, 0
        self.before_encoding = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts, name)

    def encode_images(self, pixels: Any) -> np.ndarray:
        self.encoded += 1
        self.before_encoding()
        return np.asarray(self.parts.encode_images(pixels))

    def decode(self, embeds: np.ndarray, cache: Any, *positions: Any) -> np.ndarray:
        self.positions += len(embeds)
        return np.asarray(self.parts.decode(embeds, cache, *positions))


@pytest.fixture
def counting(vlm: Vlm) -> Vlm:
    return Vlm(vlm.manifest, vlm.folder, Counting(vlm.parts))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def test_a_reply_is_the_answer(vlm: Vlm) -> None:
    for images in ([], [png(1)], [png(1), png(2)]):
        direct = vlm.answer(QUESTION, images, max_tokens=12, temperature=1.0, seed=3)
        whole = vlm.reply([user_message(QUESTION, len(images))], images, Options(12, sampling=Sampling(1.0, seed=3))).answer
        assert (whole.text, whole.token_ids, whole.prompt_tokens) == (direct.text, direct.token_ids, direct.prompt_tokens)


@pytest.mark.parametrize("shared", [True, False], ids=["one shared buffer", "a growing cache"])
def test_another_answer_to_a_prompt_computes_no_prompt_and_changes_nothing(shared: bool, counting: Vlm) -> None:
    parts = counting.parts
    assert isinstance(parts, Counting)
    assert isinstance(parts.parts, OnnxParts)
    before, parts.parts.shared = parts.parts.shared, shared
    try:
        counting.memory = PictureMemory(10**6)
        context, messages = Context(), [user_message(QUESTION, 1)]

        def ask(seed: int, context: Context | None) -> tuple[int, ...]:
            return counting.reply(messages, [png(1)], Options(8, sampling=Sampling(1.2, seed=seed)), context).answer.token_ids

        alone = [ask(seed, None) for seed in range(4)]
        assert len(set(alone)) > 1
        first = ask(0, context)
        parts.positions = 0
        assert [first, *(ask(seed, context) for seed in range(1, 4))] == alone
        assert parts.positions <= 3 * 7, "the prompt was computed again"
        # A different prompt is not taken for the same.
        other = [user_message("is it red?", 1)]
        assert counting.reply(other, [png(1)], Options(8), context).answer.token_ids == counting.reply(other, [png(1)], Options(8)).answer.token_ids
    finally:
        parts.parts.shared = before


def test_an_image_is_encoded_once_while_it_is_remembered(counting: Vlm) -> None:
    parts = counting.parts
    assert isinstance(parts, Counting)
    plain = counting.reply([user_message(QUESTION, 1)], [png(1)]).answer.token_ids
    counting.reply([user_message(QUESTION, 1)], [png(1)]).answer  # noqa: B018
    assert parts.encoded == 2, "without a memory nothing is kept"
    counting.memory = PictureMemory(2 * counting.encode(counting.see([png(1)])[0]).nbytes)
    parts.encoded = 0
    for number, expected in ((1, 1), (1, 1), (2, 2), (1, 2), (3, 3), (2, 4)):
        said = counting.reply([user_message(QUESTION, 1)], [png(number)]).answer
        assert parts.encoded == expected, "the one that was not used for longest is forgotten"
        if number == 1:
            assert said.token_ids == plain
    again = counting.reply([user_message(QUESTION, 1)], [png(2)]).answer
    assert again.timings.image_encode == 0


def test_an_image_is_known_by_its_content(counting: Vlm, tmp_path: Path) -> None:
    """A path by the file's bytes, whatever its name; what came decoded by its pixels."""
    parts = counting.parts
    assert isinstance(parts, Counting)
    counting.memory = PictureMemory(10**6)
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(png(1))
    second.write_bytes(png(1))
    array = np.asarray(picture(1))
    said = []
    for image, expected in ((first, 1), (png(1), 1), (str(second), 1), (picture(1), 2), (array, 2), (array[:, ::-1], 3)):
        said.append(counting.answer(QUESTION, [image], max_tokens=8).token_ids)
        assert parts.encoded == expected, f"after {type(image)}"
    assert len(set(said[:5])) == 1, "one picture, whatever form it comes in"
    first.write_bytes(png(2))
    counting.answer(QUESTION, [first], max_tokens=1)
    assert parts.encoded == 4, "the file holds another picture now"
    turned = picture(1)
    turned.getexif()[0x0112] = 6
    counting.answer(QUESTION, [turned], max_tokens=1)
    assert parts.encoded == 5, "the same pixels, to be shown upright"
    with pytest.raises(ImageError, match="no image file at"):
        counting.answer(QUESTION, [tmp_path / "missing.png"])


def test_the_memory_is_bounded_in_bytes_and_threads_may_share_it() -> None:
    memory = PictureMemory(100)
    made = {memory.name(text): new_picture((0, 0), np.zeros((size, 2), np.float32)) for text, size in ((b"a", 5), (b"b", 5), (b"c", 4), (b"d", 13))}
    a, b, c, d = made
    assert memory.name(b"a", alone=False) not in made

    def hammer() -> None:
        for _ in range(300):
            for name, one in made.items():
                memory.keep(name, one)
                assert memory.find(name) in (one, None)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [name for name in made if memory.find(name)]
    assert sum(made[name].features.nbytes for name in held) == memory._bytes <= 100
    memory = PictureMemory(100)
    for name in (a, b, d):
        memory.keep(name, made[name])
    assert memory.find(d) is None, "larger than the whole memory: nothing is thrown out for it"
    assert memory.find(a)
    memory.keep(c, made[c])
    assert [memory.find(name) is not None for name in (a, b, c)] == [True, False, True]
    assert PictureMemory(0).name(b"a") is None


def test_a_prompt_that_does_not_fit_is_refused_before_any_image_is_encoded(counting: Vlm) -> None:
    with pytest.raises(DataError, match="the model takes 512 in all"):
        counting.answer(QUESTION, [png(i) for i in range(8)])
    assert isinstance(counting.parts, Counting)
    assert counting.parts.encoded == 0


def test_cancelling_while_images_are_encoded(counting: Vlm) -> None:
    parts = counting.parts
    assert isinstance(parts, Counting)
    stream = counting.stream(QUESTION, [png(1), png(2), png(3)])
    parts.before_encoding = stream.cancel
    assert list(stream) == []
    assert (parts.encoded, parts.positions) == (1, 0)
    answer = stream.answer
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("cancelled", (), "")
    assert 0 < answer.timings.first_token == answer.timings.total
    chat = counting.chat()
    turn = chat.stream(QUESTION, [png(1)])
    turn.cancel()
    assert turn.answer.finish_reason == "cancelled"
    assert chat.messages == []
    assert chat.pictures == []


def test_rank_is_log_softmax_and_topk() -> None:
    logits = np.random.default_rng(0).normal(0, 8, 300).astype(np.float32)
    theirs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    best = torch.topk(theirs, 5)
    found = rank(logits, 17, 5)
    assert found.token == 17
    np.testing.assert_allclose(found.logprob, theirs[17], atol=1e-9)
    assert [token for token, _ in found.top] == best.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in found.top], best.values, atol=1e-9)
    assert rank(logits, 17, 0).top == ()
    assert rank(logits, 17, 500).top[-1][0] == int(np.argmin(logits))


def test_log_probabilities_are_told_for_every_token(vlm: Vlm) -> None:
    options = Options(12, sampling=Sampling(1.0, seed=1), top_logprobs=2)
    stream = vlm.reply([user_message(QUESTION, 1)], [png(1)], options)
    grown = [len(stream.logprobs) for _ in stream]
    ends = vlm.manifest.generation["eos_token_ids"]
    assert [one.token for one in stream.answer.logprobs] == [token for token in stream.answer.token_ids if token not in ends]
    assert all(len(one.top) == 2 and one.logprob <= one.top[0][1] for one in stream.answer.logprobs)
    assert grown == sorted(grown)
    assert grown[0] < grown[-1]
    assert vlm.reply([user_message(QUESTION)]).answer.logprobs == ()


def test_next_to_no_temperature_is_greedy() -> None:
    """Divided by so little, logits overflow; the likeliest token is meant."""
    logits = np.array([1.0, 30.0, 29.9, -5.0], np.float32)
    for temperature in (1e-300, 1e-40, 1e-4):
        assert choose(logits, np.empty(0, np.int64), Sampling(temperature, seed=0), np.random.default_rng(0)) == 1


def test_token_bytes_put_together_are_the_text(vlm: Vlm) -> None:
    tokenizer = vlm.format.tokenizer
    spell = TokenBytes(tokenizer)
    text = "What colour? é 💡 数字 \t\n end"
    assert b"".join(map(spell, tokenizer.encode(text).ids)) == text.encode()
    assert spell(vlm.manifest.generation["eos_token_ids"][0]) == b""
    assert spell(10**6) == b"", "beyond the vocabulary"


def test_token_bytes_of_sentencepiece() -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "<0xE2>": 1, "b": 2}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spell = TokenBytes(tokenizer)
    assert [spell(token) for token in range(3)] == [b" a", b"\xe2", b"b"]


def test_a_long_answers_log_probabilities_cost_little() -> None:
    logits = np.random.default_rng(0).normal(0, 5, 50_000).astype(np.float32)
    start = time.perf_counter()
    for _ in range(10):
        rank(logits, 5, 20)
    assert (time.perf_counter() - start) / 10 < 0.1
