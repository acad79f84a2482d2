"""The endpoint client against a real HTTP server that answers rightly, wrongly, half or not at all."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripted_server import DROP, HALF, NOTHING, completion, serve_script, slowly

from masters.distill import endpoint as endpoint_module
from masters.distill.endpoint import Draw, Endpoint, ask, data_url
from masters.distill.generate import Generated, Sampling
from masters.distill.inputs import Encoder
from masters.errors import ImageError, RunError
from masters.images import open_image
from masters.samples import Sample

SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1, max_tokens=9)
DRAW = Draw(2, SAMPLING, seed=5, weights="teacher0-stage1")


def to(url: str, **settings: Any) -> Endpoint:
    return dataclasses.replace(Endpoint(url, "tiny", pause=0.01, retries=2, timeout=5.0), **settings)


def told(encoder: Encoder, *texts: str, **more: Any) -> dict[str, Any]:
    """A completion whose server tells the ids, as vLLM does."""
    body = completion(*texts, **more)
    for choice, text in zip(body["choices"], texts, strict=True):
        choice["token_ids"] = encoder.answer(text)
    return body


def answers(endpoint: Endpoint, encoder: Encoder, samples: list[Sample], draw: Draw = DRAW) -> dict[str, list[Generated]]:
    return {sample.id: found for sample, found in ask(endpoint, encoder, samples, draw)}


def until_it_stops(asked: Iterator[tuple[Sample, list[Generated]]]) -> tuple[list[str], str]:
    """The questions that were answered before the RunError, and its message."""
    kept: list[str] = []
    try:
        for sample, _ in asked:
            kept.append(sample.id)
    except RunError as error:
        return kept, str(error)
    raise AssertionError("it went on to the end")


def test_a_request_carries_the_whole_sampling_and_the_very_images(encoder: Encoder, samples: list[Sample]):
    two = dataclasses.replace(samples[0], id="two", images=samples[0].images + samples[1].images)
    with serve_script(lambda request, _: (200, told(encoder, "yes", "no"))) as server:
        found = answers(to(server.url), encoder, [two])
    request = server.requests[-1]
    assert [(a.text, list(a.ids), a.finish, a.told) for a in found["two"]] == [(text, encoder.answer(text), "stop", True) for text in ("yes", "no")]
    sent = {key: request[key] for key in ("model", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stream")}
    assert sent == dict(model="tiny", n=2, max_tokens=9, temperature=0.7, top_p=0.8, top_k=20, min_p=0.0, repetition_penalty=1.1, stream=False)
    assert request["repeat_penalty"] == 1.1, "llama.cpp's name for it"
    assert request["logit_bias"] == {str(token): -100 for token in encoder.image_tokens}
    [turn] = request["messages"]
    assert [part["type"] for part in turn["content"]] == ["image_url", "image_url", "text"]
    assert turn["content"][-1]["text"] == two.prompt
    for part, image in zip(turn["content"], two.images, strict=False):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == Path(image).read_bytes()  # type: ignore[arg-type]


def test_seeds_and_the_salt_of_the_prefix_cache_follow_from_what_is_asked(encoder: Encoder, samples: list[Sample]):
    def asked(draw: Draw, **settings: Any) -> list[tuple[Any, ...]]:
        with serve_script(lambda request, _: (200, told(encoder, *["yes"] * request["n"]))) as server:
            answers(to(server.url, **settings), encoder, samples[:2], draw)
        return sorted((r["messages"][0]["content"][-1]["text"], r["seed"], r["n"], r["cache_salt"]) for r in server.requests[1:])

    base = asked(DRAW)
    assert asked(DRAW) == base
    assert len({seed for _, seed, *_ in base}) == 2
    one_by_one = asked(DRAW, per_request=1)
    assert [n for *_, n, _ in one_by_one] == [1] * 4
    assert len({seed for _, seed, *_ in one_by_one}) == 4, "every request draws anew"
    others = asked(dataclasses.replace(DRAW, weights="teacher0-stage2"))
    assert {salt for *_, salt in others}.isdisjoint({salt for *_, salt in base}), "other weights share no prefix"
    assert {seed for _, seed, *_ in others}.isdisjoint({seed for _, seed, *_ in base})


def test_the_caches_are_emptied_before_the_first_question(encoder: Encoder, samples: list[Sample]):
    with serve_script(lambda request, _: (200, told(encoder, "yes", "no"))) as server:
        answers(to(server.url), encoder, samples[:1])
    assert server.posted == ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]


def test_many_requests_are_under_way_and_never_too_many(encoder: Encoder, samples: list[Sample]):
    with serve_script(slowly(0.05, lambda request: (200, told(encoder, *["yes"] * request["n"])))) as server:
        found = answers(to(server.url, concurrency=3, per_request=1), encoder, samples[:12])
    assert found.keys() == {sample.id for sample in samples[:12]}
    assert server.most == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, {"error": "broken"}), (429, {"error": "later"}), (503, b"no"), (200, b"<html>garbage"), (200, b"[1]"), (HALF, completion("yes")), (DROP, b"")],
    ids=["500", "429", "503", "garbage", "a list", "half a stream", "dropped"],
)
def test_what_may_pass_is_asked_again_and_fails_alone_if_it_does_not(encoder: Encoder, samples: list[Sample], status: Any, body: Any):
    bad = samples[3]

    def script(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        mine = request["messages"][0]["content"][-1]["text"] == bad.prompt
        if mine:
            times.append(time.monotonic())
        return (status, body) if mine and len(times) not in good else (200, told(encoder, "yes", "no"))

    asked = [sample for sample in samples[:8] if sample is bad or sample.prompt != bad.prompt]
    times: list[float] = []
    good = {3}
    with serve_script(script) as server:
        found = answers(to(server.url, pause=0.1), encoder, asked)
    assert {a.finish for answers in found.values() for a in answers} == {"stop"}
    assert len(times) == 3, "the third try was answered"
    assert times[1] - times[0] > 0.05
    assert times[2] - times[1] > 0.1, "later each time"

    times, good = [], set()
    with serve_script(script) as server:
        found = answers(to(server.url), encoder, asked)
    assert len(times) == 3
    assert [(a.text, a.ids, a.finish) for a in found[bad.id]] == [("", (), "failed")] * 2
    assert "3 times" in found[bad.id][0].reason
    assert "\n" not in found[bad.id][0].reason
    assert {a.finish for name, answers in found.items() if name != bad.id for a in answers} == {"stop"}


def test_a_server_that_never_answers_is_not_waited_for(encoder: Encoder, samples: list[Sample]):
    with serve_script(lambda request, count: (NOTHING, b"") if count > 1 else (200, told(encoder, "yes", "no"))) as server:
        [[failed, _]] = answers(to(server.url, timeout=0.2, retries=1), encoder, samples[:1]).values()
    assert failed.reason == "no answer within 0.2 s, 2 times"


def test_retry_after_is_heeded(encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    real = endpoint_module.asyncio.sleep

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await real(0)

    monkeypatch.setattr(endpoint_module.asyncio, "sleep", sleep)
    with serve_script(
        lambda request, count: (
            (
                429,
                {"error": "later"},
            )
            if count == 2
            else (200, told(encoder, "yes", "no"))
        )
    ) as server:
        server.retry_after = 7
        answers(to(server.url), encoder, samples[:1])
    assert waited == [7.0]


def test_a_refused_key_stops_the_run_at_once(encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    with serve_script(lambda request, _: (401, {"error": {"message": "bad key"}})) as server:
        with pytest.raises(RunError, match=r"answered 401 .*bad key.*\$MASTERS_ENDPOINT_KEY is not set") as caught:
            answers(to(server.url), encoder, samples)
        assert len(server.requests) == 1
        monkeypatch.setenv("MY_KEY", "secret-word")
        with pytest.raises(RunError, match=r"\$MY_KEY was refused") as again:
            answers(to(server.url, key_variable="MY_KEY"), encoder, samples)
    assert server.headers[-1]["authorization"] == "Bearer secret-word"
    for error in (caught, again):
        assert "\n" not in str(error.value)
        assert "secret-word" not in str(error.value)


def test_a_key_that_expires_in_the_middle_keeps_what_was_answered(encoder: Encoder, samples: list[Sample]):
    with serve_script(lambda request, count: (401, {}) if count > 9 else (200, told(encoder, "yes", "no"))) as server:
        kept, error = until_it_stops(ask(to(server.url, concurrency=1), encoder, samples, DRAW))
    assert "answered 401" in error
    assert len(kept) == 8, "the first request was the probe"


def test_a_model_that_is_not_served_stops_the_run(encoder: Encoder, samples: list[Sample]):
    with serve_script(lambda request, _: (404, {"error": "no such model"})) as server, pytest.raises(RunError, match=r"answered 404 .*serve the model 'tiny'"):
        answers(to(server.url), encoder, samples)


def test_a_question_that_the_server_refuses_is_not_asked_again(encoder: Encoder, samples: list[Sample]):
    long = dataclasses.replace(samples[5], id="long", question="how long is this very long question?")

    def script(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        refused = "very long" in request["messages"][0]["content"][-1]["text"]
        return (400, {"error": {"message": "the prompt is longer than the context"}}) if refused else (200, told(encoder, "yes", "no"))

    with serve_script(script) as server:
        found = answers(to(server.url), encoder, [samples[0], long])
    assert len(server.requests) == 3
    assert "answered 400" in found["long"][0].reason
    assert "longer than the context" in found["long"][0].reason


def test_a_server_that_fails_everything_is_given_up(encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_module, "GIVE_UP", 6)
    with serve_script(lambda request, _: (500, {"error": "out of memory"})) as server:
        kept, error = until_it_stops(ask(to(server.url, concurrency=2, retries=0), encoder, samples, DRAW))
    assert re.search("failed 6 questions in a row, lastly with: the server answered 500 .*out of memory", error)
    assert len(kept) == 6
    with pytest.raises(RunError, match="ConnectError"):
        answers(to(server.url, retries=0), encoder, samples)


def test_fields_that_a_server_does_not_know_are_left_out_but_not_the_sampling(encoder: Encoder, samples: list[Sample]):
    known = {"model", "messages", "n", "seed", "stream", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}

    def strict(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        unknown = sorted(request.keys() - known)
        return (400, {"error": {"message": f"unknown field '{unknown[0]}'"}}) if unknown else (200, completion(*["yes"] * request["n"]))

    with serve_script(strict) as server:
        found = answers(to(server.url), encoder, samples[:4])
        assert {a.finish for answers in found.values() for a in answers} == {"stop"}
        assert {frozenset(request) for request in server.requests[-4:]} == {frozenset(known)}
        known.remove("top_k")
        with pytest.raises(RunError, match="unknown field 'top_k'"):
            answers(to(server.url), encoder, samples * 2)


def test_a_refusal_that_lists_what_is_known_costs_its_own_field_alone(encoder: Encoder, samples: list[Sample]):
    known = {"model", "messages", "n", "seed", "stream", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "return_token_ids", "min_p"}

    def strict(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        unknown = sorted(request.keys() - known)
        error = {"message": f"unknown field; expected fields of {', '.join(sorted(known))}", "param": (unknown or [None])[0]}
        return (400, {"error": error}) if unknown else (200, told(encoder, *["yes"] * request["n"]))

    with serve_script(strict) as server:
        found = answers(to(server.url), encoder, samples[:2])
    assert all(answer.told for group in found.values() for answer in group)
    assert set(server.requests[-1]) == known


def test_images_are_sent_as_training_sees_them(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    plain, turned, palette, bmp = (tmp_path / name for name in ("plain.jpg", "turned.jpg", "palette.png", "a.bmp"))
    picture = Image.fromarray(pixels)
    picture.save(plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(turned, exif=exif)
    picture.convert("P").save(palette, transparency=0)
    picture.save(bmp)
    for path, kind in ((plain, "jpeg"), (turned, "png"), (palette, "png"), (bmp, "png")):
        head, _, data = data_url(path).partition(",")
        assert head == f"data:image/{kind};base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert sent.mode == "RGB"
        assert np.array_equal(np.asarray(sent), np.asarray(open_image(path))), path.name
    assert data_url(plain.read_bytes()) == data_url(plain)
    with pytest.raises(ImageError, match=r"absent\.png"):
        data_url(tmp_path / "absent.png")


def test_a_missing_image_fails_its_question_alone(encoder: Encoder, samples: list[Sample], tmp_path: Path):
    gone = dataclasses.replace(samples[0], id="gone", images=(tmp_path / "gone.png",))
    with serve_script(lambda request, _: (200, told(encoder, "yes", "no"))) as server:
        found = answers(to(server.url), encoder, [gone, samples[1]])
    assert "no image file at" in found["gone"][0].reason
    assert found[samples[1].id][0].text == "yes"
