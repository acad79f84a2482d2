"""The server through OpenAI's own client: every answer is what the model says when asked directly, or what PyTorch says."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
import torch
from server_process import Running, encoded, image_part, served, user_turn
from torch_reference import Torch, picture

from masters.runtime import Vlm

QUESTION = "what colour is the shape?"


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with served(bundle, "--name", "student", "--parallel", "2", "--queue", "64") as running:
        yield running
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30)


def ask(client: openai.OpenAI, messages: list[Any] | None = None, **options: Any) -> Any:
    return client.chat.completions.create(model="student", messages=messages or [user_turn(QUESTION, encoded(1))], **({"max_tokens": 16} | options))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_answer_is_the_models(count: int, client: openai.OpenAI, vlm: Vlm) -> None:
    images = [encoded(seed, 40 + 30 * seed, 90) for seed in range(count)]
    expected = vlm.answer(QUESTION, images, max_tokens=24)
    found = ask(client, [user_turn(QUESTION, *images)], max_tokens=24)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == expected.finish_reason
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
    assert found.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    assert (found.object, found.model) == ("chat.completion", "student")


def test_a_stream_brings_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *said, last = chunks
    pieces = [chunk.choices[0].delta.content for chunk in said if chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert said[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + [whole.choices[0].finish_reason]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in said)
    assert len({chunk.id for chunk in chunks}) == 1


class Sign(pydantic.BaseModel):
    """What OpenAI's client makes a strict schema of."""

    colour: Literal["red", "green"]
    digits: int = pydantic.Field(ge=0, le=99)


def test_a_constrained_answer_is_valid(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="student", messages=[user_turn(QUESTION, encoded(1))], response_format=Sign, max_tokens=64)
    assert isinstance(parsed.choices[0].message.parsed, Sign)
    assert parsed.choices[0].finish_reason == "stop"
    for wish, allowed in (
        ({"choice": ["red", "reddish"]}, "red|reddish"),
        ({"regex": r"[a-f]{2}\d"}, r"[a-f]{2}\d"),
        ({"json": {"type": "boolean"}}, "true|false"),
    ):
        chosen = ask(client, extra_body={"structured_outputs": wish}, n=3, temperature=2, seed=1)
        assert all(re.fullmatch(allowed, choice.message.content) for choice in chosen.choices)
    pieces = ask(client, stream=True, response_format={"type": "json_object"}, max_tokens=3)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces).startswith("{")


def test_a_streams_lines(server: Running) -> None:
    body = json.dumps({"messages": [user_turn("hi")], "stream": True, "max_tokens": 4})
    status, headers, answer = server.request("POST", "/v1/chat/completions", body)
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *events, end, nothing = answer.decode().split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))
    times = json.loads(events[-1].removeprefix("data: "))["timings"]
    assert 0 < times["prefill"] <= times["first_token"] <= times["total"]


def test_a_conversation_equals_pytorchs(client: openai.OpenAI, pytorch: Torch) -> None:
    """Two images in two turns, a system prompt, an answer in between: the model sees all of it, in order."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        user_turn("what colour is it?", encoded(1)),
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [{"type": "text", "text": "and larger "}, image_part(encoded(2, 70, 70)), {"type": "text", "text": "this one?"}]},
    ]
    theirs: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "and larger "}, {"type": "image"}, {"type": "text", "text": "this one?"}]},
    ]
    inputs = pytorch.inputs(theirs, [picture(1), picture(2, 70, 70)])
    with torch.no_grad():
        made = pytorch.model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = pytorch.processor.tokenizer.decode(made, skip_special_tokens=True).lstrip().rstrip("\ufffd")
    found = ask(client, messages)
    assert found.choices[0].message.content.rstrip("\ufffd") == expected
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert ask(client, messages[1:]).choices[0].message.content != found.choices[0].message.content, "the system prompt changes nothing"


def test_several_choices_have_seeds_of_their_own(client: openai.OpenAI, vlm: Vlm) -> None:
    found = ask(client, n=3, seed=7, temperature=1.2, top_p=0.9)
    texts = [choice.message.content for choice in found.choices]
    expected = [vlm.answer(QUESTION, [encoded(1)], max_tokens=16, seed=7 + i, temperature=1.2, top_p=0.9) for i in range(3)]
    assert texts == [answer.text for answer in expected]
    assert len(set(texts)) == 3
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.completion_tokens == sum(len(answer.token_ids) for answer in expected)
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, seed=7, temperature=1.2, top_p=0.9, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    def said(**options: Any) -> str:
        return ask(client, temperature=1.5, **options).choices[0].message.content

    assert said(seed=-5) == said(seed=-5)
    assert len({said() for _ in range(4)}) > 1, "without a seed each answer is drawn anew"


def test_stop_ends_the_answer_before_it(client: openai.OpenAI, vlm: Vlm) -> None:
    free = vlm.answer(QUESTION, [encoded(1)], max_tokens=24).text
    stop = free[8:11]
    for given in (stop, ["never said", stop]):
        found = ask(client, max_completion_tokens=24, stop=given).choices[0]
        assert found.message.content == free[: free.index(stop)]
        assert found.finish_reason == "stop"


def test_logprobs_are_pytorchs(client: openai.OpenAI, pytorch: Torch, vlm: Vlm) -> None:
    # Up to a token that transformers won't read back as said: the end, or an image's.
    odd = {*vlm.manifest.generation["eos_token_ids"], vlm.manifest.generation["image_token_id"]}
    answers = {seed: vlm.answer(QUESTION, [picture(seed)], max_tokens=16).token_ids for seed in range(8)}
    readable = {seed: list(itertools.takewhile(lambda token: token not in odd, said)) for seed, said in answers.items()}
    seed, tokens = max(readable.items(), key=lambda item: len(item[1]))
    assert len(tokens) > 4
    inputs = pytorch.inputs([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}], [picture(seed)])
    length = inputs["input_ids"].shape[1]
    full = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1), "attention_mask": torch.ones(1, length + len(tokens)).long()}
    with torch.no_grad():
        theirs = torch.log_softmax(pytorch.model(**full).logits[0, length - 1 : -1].double(), -1)
    found = ask(client, [user_turn(QUESTION, encoded(seed))], logprobs=True, top_logprobs=3).choices[0].logprobs.content[: len(tokens)]
    assert len(found) == len(tokens)
    difference = max(abs(one.logprob - float(row[token])) for one, row, token in zip(found, theirs, tokens, strict=True))
    assert difference < 1e-3, f"largest difference of a log-probability {difference}"
    for one, row in zip(found, theirs, strict=True):
        np.testing.assert_allclose([top.logprob for top in one.top_logprobs], torch.topk(row, 3).values, atol=1e-3)
        assert one.top_logprobs[0].token == one.token, "a greedy answer takes the likeliest"


def test_logprobs_spell_the_answer(client: openai.OpenAI, vlm: Vlm) -> None:
    whole = ask(client, logprobs=True).choices[0]
    spelt = b"".join(bytes(one.bytes) for one in whole.logprobs.content)
    assert spelt.decode("utf-8", "replace").lstrip().rstrip("\ufffd") == whole.message.content.rstrip("\ufffd")
    told = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=True, stream=True)]
    streamed = [one for logprobs in told if logprobs for one in logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in whole.logprobs.content][: len(streamed)]
    assert len(streamed) > len(whole.logprobs.content) - 4, "only an unfinished character at the very end is left out"
    assert ask(client).choices[0].logprobs is None
    # A stop string's own tokens are not told.
    text = whole.message.content
    cut = ask(client, logprobs=True, stop=text[8:11]).choices[0]
    assert len(cut.logprobs.content) < len(whole.logprobs.content)
    spelt = b"".join(bytes(one.bytes) for one in cut.logprobs.content).lstrip()
    assert spelt.startswith(cut.message.content.encode()) or "\ufffd" in cut.message.content


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["student"]
    assert client.models.retrieve("student").owned_by == "masters"
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="this server has 'student'"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])


def test_a_refusal_is_a_typed_error_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="could not decode an image of 8 bytes") as caught:
        ask(client, [user_turn(QUESTION, b"no image")])
    assert (caught.value.param, caught.value.code, caught.value.type) == ("messages", "invalid_image", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="the model takes 512 in all"):
        ask(client, [user_turn("what is it? " * 300)], stream=True)


def test_a_request_of_an_evaluation_suite(server: Running, vlm: Vlm) -> None:
    """VLMEvalKit's API model posts this with its own HTTP code."""
    text = {"type": "text", "text": QUESTION}
    image = image_part(encoded(1))
    image["image_url"]["detail"] = "low"
    body = {"model": "student", "messages": [{"role": "user", "content": [text, image]}], "max_tokens": 8, "n": 1, "temperature": 0}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)["choices"][0]["message"]["content"].strip()
    assert answer == vlm.reply([{"role": "user", "content": [text, {"type": "image"}]}], [encoded(1)]).answer.text[: len(answer)].strip() != ""


def test_concurrent_requests_each_get_their_own_answer(server: Running, client: openai.OpenAI, vlm: Vlm) -> None:
    kinds = [(question, seed) for question in (QUESTION, "is it red?", "read the digits.") for seed in (1, 2, 3)]
    expected = {kind: vlm.answer(kind[0], [encoded(kind[1])], max_tokens=12).text for kind in kinds}
    assert len(set(expected.values())) == len(kinds)
    wanted = list(itertools.islice(itertools.cycle(kinds), 54))

    def one(number: int) -> str:
        question, seed = wanted[number]
        messages = [user_turn(question, encoded(seed))]
        if number % 2:
            return str(ask(client, messages, max_tokens=12).choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, messages, max_tokens=12, stream=True))

    before = server.metric("masters_requests_total", path="/v1/chat/completions", code="200")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(len(wanted))))
    assert found == [expected[kind] for kind in wanted]
    assert server.metric("masters_requests_total", path="/v1/chat/completions", code="200") == before + 54
    server.wait_for("masters_running", 0)
    assert server.metric("masters_queue_length") == 0


def test_metrics_count(server: Running, client: openai.OpenAI) -> None:
    names = ("masters_prompt_tokens_total", "masters_generated_tokens_total", "masters_first_token_seconds_count", "masters_answer_seconds_count")
    before = [server.metric(name) for name in names]
    server.request("GET", "/nowhere")
    refused = server.metric("masters_requests_total", code="404", path="other")
    usage = ask(client, n=2).usage
    server.request("GET", "/nowhere/" + "x" * 50)
    server.wait_for("masters_running", 0)
    after = [server.metric(name) for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [usage.prompt_tokens, usage.completion_tokens, 1, 1]
    assert server.metric("masters_requests_total", code="404", path="other") == refused + 1
    assert server.metric("process_resident_memory_bytes") > 1e7


def test_an_answer_is_sent_at_once(server: Running) -> None:
    """Head and body in two packets, the second held back until the first is acknowledged, would take 40 ms each time."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", b"{}", {"Content-Type": "application/json"})
        connection.getresponse().read()
        times.append(time.perf_counter() - start)
    connection.close()
    assert min(times) < 0.03


def test_health(server: Running) -> None:
    status, headers, body = server.request("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "model": "student"})
    assert headers["cache-control"] == "no-store"
