"""What strangers send: a 4xx with a reason, never a 500, never a hang; and who may send anything at all."""

from __future__ import annotations

import base64
import copy
import http.client
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from server_process import Running, data_url, encoded, image_part, served, user_turn

from masters.errors import RecipeError
from masters.runtime.serve import ServeConfig

CHAT = "/v1/chat/completions"
LIMIT = 2_000_000


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with served(bundle, "--max-body-mb", str(LIMIT / 1e6), "--max-images", "3", "--max-megapixels", "20", "--queue", "4", "--max-tokens", "4") as running:
        yield running
        assert "Traceback" not in running.log.read_text()


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG whose head states a size; of its pixels, all black, only `rows` rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((width + 1) * (height if rows is None else rows)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def image_url(url: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]}]


def deep(levels: int) -> str:
    return '{"messages":' + "[" * levels + "]" * levels + "}"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
HI = [{"role": "user", "content": "hi"}]
SCANS = encoded(1, 64, 64, "JPEG")[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 70 + b"\xff\xd9"


# What is sent, the status, and words of the reason.
def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "integer"}


BODIES: list[tuple[Any, int, str]] = [
    (b"", 400, "no valid JSON"),
    (b"{", 400, "no valid JSON"),
    (b"\xff\xfe{}", 400, "no valid JSON"),
    (b"[1, 2]", 400, "a list of 2"),
    (b"null", 400, "missing"),
    (deep(500), 400, "messages"),
    (deep(100_000), 400, "nested too deeply"),
    ('{"messages": ' + "9" * 5000 + "}", 400, "no valid JSON"),
    ('{"messages": [], "temperature": NaN}', 400, "NaN is no JSON number"),
    ('{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}', 400, "'temperature' is inf"),
    ({}, 400, "'messages' is missing"),
    ({"messages": []}, 400, "at least one turn"),
    ({"messages": "hi"}, 400, "'messages' is 'hi'"),
    ({"messages": ["hi"]}, 400, "messages[0] is 'hi'"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "role is 'wizard'"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, 400, "role is a list"),
    ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "1"}]}, 400, "role is 'tool'"),
    ({"messages": [{"content": "hi"}]}, 400, "role is missing"),
    ({"messages": [{"role": "user"}]}, 400, "content is missing"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "is empty"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "a list of 0"),
    ({"messages": [{"role": "user", "content": [5]}]}, 400, "content[0] is 5"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "content[0] is an object"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, 400, "takes 'text' and 'image_url'"),
    ({"messages": [*HI, {"role": "assistant", "content": "yes"}]}, 400, "the last message is the assistant's"),
    ({"messages": [{"role": "system", "content": image_url("x")[0]["content"]}, *HI]}, 400, "image in a turn of the system"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *HI]}, 400, "holds a call"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ({"messages": [{"role": "user", "content": "a <image> b"}]}, 400, "'<image>' marks"),
    ({"messages": HI * 600}, 400, "600 messages can't fit"),
    ({"messages": [{"role": "user", "content": "word " * 100_000}]}, 400, "500,000 characters"),
    ({"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "the model takes 512 in all"),
    ({"messages": HI, "max_tokens": 0}, 400, "'max_tokens' is 0"),
    ({"messages": HI, "max_tokens": -1}, 400, "'max_tokens' is -1"),
    ({"messages": HI, "max_tokens": 1.5}, 400, "whole number"),
    ({"messages": HI, "max_tokens": True}, 400, "'max_tokens' is true"),
    ({"messages": HI, "max_completion_tokens": 10**40}, 400, "'max_completion_tokens' is 1000"),
    ({"messages": HI, "temperature": "hot"}, 400, "'temperature' is 'hot'"),
    ({"messages": HI, "temperature": -0.1}, 400, "from 0 to 2"),
    ({"messages": HI, "top_p": 1.1}, 400, "'top_p' is 1.1"),
    ({"messages": HI, "seed": 2**63}, 400, "'seed'"),
    ({"messages": HI, "n": 1000}, 400, "'n' is 1000"),
    ({"messages": HI, "stop": [""]}, 400, "'stop' holds ''"),
    ({"messages": HI, "stop": ["a"] * 5}, 400, "at most 4"),
    ({"messages": HI, "stop": "x" * 1000}, 400, "1 to 256 characters"),
    ({"messages": HI, "stream": "yes"}, 400, "true or false"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream"),
    ({"messages": HI, "return_token_ids": 1}, 400, "true or false"),
    ({"messages": HI, "top_logprobs": 3}, 400, "without 'logprobs'"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "from 0 to 20"),
    ({"messages": HI, "tools": [{"type": "function"}]}, 400, "'tools' is a list of 1, which this server can't do"),
    ({"messages": HI, "response_format": {"type": "grammar"}}, 400, "'response_format' is of a form"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}}, 400, "Invalid type: colour"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": nested(300)}}}, 400, "recursion limit exceeded"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}}}, 400, "does not fetch"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}}, 400, "expected one of them"),
    ({"messages": HI, "structured_outputs": {"choice": ["a", 5]}}, 400, "no list of texts"),
    ({"messages": HI, "structured_outputs": {"choice": ["\ud800"]}}, 400, "half of a surrogate pair"),
    ({"messages": HI, "structured_outputs": {"regex": "(" * 9000 + "a" + ")" * 9000}}, 400, "nested parentheses"),
    ({"messages": HI, "structured_outputs": {"regex": "a" * 40_000}}, 400, "40,000 characters"),
    ({"messages": HI, "structured_outputs": {"regex": "[a&&b]"}}, 400, "nothing satisfies it"),
    ({"messages": HI, "frequency_penalty": 0.5}, 400, "'frequency_penalty' is 0.5"),
    ({"messages": HI, "max_token": 5}, 400, "unknown field 'max_token'"),
    ({"messages": HI, "\ud800": 5}, 400, "unknown field '?'"),
    ({"messages": HI, "model": {"a": 1}}, 404, "the model an object is not here"),
    ({"messages": image_url(5)}, 400, "an object"),
    ({"messages": image_url("file:///etc/passwd")}, 400, "expected a data: URL"),
    ({"messages": image_url("data:text/html;base64,PGI+")}, 400, "URL begins with 'data:text/html"),
    ({"messages": image_url("data:image/png,abc")}, 400, "expected 'data:image/png;base64,'"),
    ({"messages": image_url("data:image/png;base64,***")}, 400, "no valid base64"),
    ({"messages": image_url("data:image/png;base64,")}, 400, "could not decode an image of 0 bytes"),
    ({"messages": image_url("data:image/png;base64,AAA")}, 400, "no valid base64"),
    ({"messages": image_url(data_url(encoded(1)[:300]))}, 400, "could not decode"),
    ({"messages": image_url(data_url(EPS))}, 400, "could not decode"),
    ({"messages": image_url(data_url(png(1, 1)))}, 400, "a single one shows nothing"),
    ({"messages": image_url(data_url(png(20_000, 20_000, 10)))}, 400, "400000000 pixels"),
    ({"messages": image_url(data_url(png(12_000, 12_000, 10)))}, 400, "144 megapixels"),
    ({"messages": image_url(data_url(png(5000, 5000)))}, 400, "25 megapixels so far; at most 20"),
    ({"messages": [user_turn("hi", png(3000, 3000), png(3000, 3000), png(3000, 3000))]}, 400, "27 megapixels so far"),
    ({"messages": image_url(data_url(png(4000, 10)))}, 400, "200 times the other"),
    ({"messages": image_url(data_url(SCANS))}, 400, "over 64 scans"),
    ({"messages": [user_turn("hi", *[encoded(i) for i in range(4)])]}, 400, "more than 3 images"),
]


def checked(status: int, answer: bytes) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's form."""
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert 400 <= status < 500, error
    return error


@pytest.mark.parametrize(("body", "status", "reason"), BODIES, ids=[reason for _, _, reason in BODIES])
def test_a_hostile_body_is_refused_with_its_reason(body: Any, status: int, reason: str, server: Running) -> None:
    start = time.monotonic()
    found, _, answer = server.request("POST", CHAT, body if isinstance(body, bytes | str) else json.dumps(body))
    assert time.monotonic() - start < 5
    assert found == status, answer
    assert reason in checked(found, answer)["message"]


def test_what_is_unusual_but_right_is_served(server: Running) -> None:
    odd = {"messages": HI, "user": "me", "store": None, "tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}, "logit_bias": {}}
    for extra in (
        {},
        {"temperature": 1e-300, "seed": 0},
        {"temperature": 2, "top_p": 0, "top_k": 1},
        {"max_tokens": 10**9, "stop": "e"},
        {"n": None, "stream": False},
        {"structured_outputs": {"regex": "(.*a){30}" * 100}, "max_tokens": 5},
    ):
        status, answer = server.ask(**odd | extra)
        assert status == 200, answer
    text = "\u0000 é 💡 <|im_start|> {{ 7 * 7 }} {% raise %}"
    status, answer = server.ask(messages=[{"role": "user", "content": text}], max_completion_tokens=3, max_tokens=9)
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 3
    assert server.ask(messages=HI)[1]["usage"]["completion_tokens"] <= 4, "the server's own --max-tokens"


def test_mutated_requests(server: Running) -> None:
    """Bytes flipped, cut and doubled, values swapped for others of another kind: a refusal or, where it still is a request, an answer."""
    rng = random.Random(0)
    question = {"role": "user", "content": [image_part(encoded(1, 20, 20)), {"type": "text", "text": "what?"}]}
    right = {
        "model": server.ask(messages=HI)[1]["model"],
        "messages": [{"role": "system", "content": "Be brief."}, question],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["x"],
        "n": 1,
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    statuses: list[int] = []
    slowest = 0.0
    count = mutations(2000)
    for number in range(count):
        body = mutate_bytes(json.dumps(right).encode(), rng) if number % 2 else json.dumps(mutate_tree(right, rng)).encode()
        start = time.monotonic()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        slowest = max(slowest, time.monotonic() - start)
        statuses.append(response.status)
        if response.status == 200:
            assert json.loads(answer)["object"] == "chat.completion"
        else:
            checked(response.status, answer)
    assert slowest < 5
    print(f"{count} mutated requests: {dict(Counter(statuses))}, slowest {slowest:.2f} s")
    assert statuses.count(200) < count / 2
    assert len(set(statuses)) > 1
    assert server.ask(messages=HI)[0] == 200


def mutations(usual: int) -> int:
    """How many to try: all that a release is worth by MASTERS_MUTATIONS, a part of it in every run of the tests."""
    return int(os.environ.get("MASTERS_MUTATIONS", usual))


def mutate_bytes(body: bytes, rng: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                del changed[place : place + rng.randint(1, 40)]
            case 2:
                changed[place:place] = changed[place : place + rng.randint(1, 40)]
            case _:
                changed[place:place] = rng.choice([b"\x00", b'"', b"[", b"{", b"\\ud800", b"1e999", b"null", b"\xf0\x9f"])
    return bytes(changed)


VALUES: list[Any] = [
    *(None, True, -1, 0, 2**70, 1e308, -1e-308, "", "user", "\ud83d", "a" * 3000, "data:image/png;base64,AAAA"),
    *([], [[]], {}, {"type": "text"}, [None]),
]


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """A copy with one to three nodes replaced, dropped or doubled."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(list(places(changed)))
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, list):
                node.insert(key, copy.deepcopy(node[key]))
            case _:
                node[key] = copy.deepcopy(rng.choice(VALUES))
        if not changed:
            break
    return changed


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from places(value[key])


def test_a_mutated_image_is_refused_or_answered(server: Running) -> None:
    rng = random.Random(1)
    files = [encoded(1, 40, 40, form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    statuses = []
    slowest, count = 0.0, mutations(120)
    for number in range(count):
        image = bytearray(files[number % len(files)])
        for _ in range(rng.randint(1, 10)):
            image[rng.randrange(len(image))] = rng.randrange(256)
        body = {"messages": image_url("data:image/png;base64," + base64.b64encode(bytes(image)).decode()), "max_tokens": 1}
        start = time.monotonic()
        status, _, answer = server.request("POST", CHAT, json.dumps(body))
        slowest = max(slowest, time.monotonic() - start)
        statuses.append(status)
        if status != 200:
            assert checked(status, answer)["param"] == "messages"
    print(f"{count} mutated images: {dict(Counter(statuses))}, slowest {slowest:.2f} s")
    assert slowest < 5
    assert {200, 400} == set(statuses)


def test_nothing_is_fetched(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        status, answer = server.ask(messages=image_url(f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"))
        assert status == 400
        assert "this server fetches nothing" in answer["error"]["message"]
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("declared", [True, False], ids=["by its length", "in chunks"])
def test_a_body_too_large_is_refused(declared: bool, server: Running) -> None:
    body = b"x" * (LIMIT + 1_000_000)
    status, _, answer = server.request("POST", CHAT, body if declared else io.BytesIO(body))
    assert status == 413
    assert "at most 2 MB" in checked(status, answer)["message"]
    assert server.ask(messages=HI)[0] == 200


def test_other_ways_in_are_refused(server: Running) -> None:
    for method, path, status in (("GET", CHAT, 405), ("POST", "/health", 405), ("DELETE", "/", 405), ("GET", "/v1", 404), ("GET", "/../etc/passwd", 404)):
        found, _, answer = server.request(method, path)
        assert found == status
        assert "expected GET" in checked(found, answer)["message"]
    status, _, answer = server.request("POST", CHAT, json.dumps({"messages": HI}), Content_Type="text/plain")
    assert (status, checked(status, answer)["type"]) == (415, "invalid_request_error")


def test_another_sites_page_is_refused(server: Running) -> None:
    """A page whose domain was pointed at this machine sends its own name."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        status, _, answer = server.request("POST", CHAT, json.dumps({"messages": HI}), Host=host)
        assert status == 403
        assert "Host header" in checked(status, answer)["message"]
    for host in ("localhost", f"LOCALHOST:{server.port}", "[::1]:80", "127.0.0.1"):
        assert server.request("GET", "/v1/models", Host=host)[0] == 200
    assert "access-control-allow-origin" not in server.request("OPTIONS", CHAT, Origin="https://evil.example")[1]


def test_a_key_opens(bundle: Path) -> None:
    with served(bundle, "--host", "127.0.0.1", key="k3y-of-the-house") as server:
        body = json.dumps({"messages": HI, "max_tokens": 2})
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer k3y-of-the-housf"}, {"Authorization": "Basic k3y-of-the-house"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("GET", "/metrics")):
                status, headers, answer = server.request(method, path, body if method == "POST" else None, **wrong)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert checked(status, answer)["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer k3y-of-the-house", "Host": "any.example"}
        assert server.request("POST", CHAT, body, **right)[0] == 200
        assert server.request("GET", "/metrics", **right)[0] == 200
        assert server.request("GET", "/health")[0] == server.request("GET", "/")[0] == 200
        assert b"k3y-of-the-house" not in server.log.read_bytes()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_another_address_needs_a_key(host: str) -> None:
    with pytest.raises(RecipeError, match="other machines reach, and there is no API key"):
        ServeConfig(Path("bundle"), host=host)
    assert "secret" not in repr(ServeConfig(Path("bundle"), host=host, api_key="secret"))
    for key in ("", " ", "two words ", "schlüssel"):
        with pytest.raises(RecipeError, match="API key is empty or holds"):
            ServeConfig(Path("bundle"), host=host, api_key=key)


@pytest.mark.parametrize(("option", "value"), [("port", 70000), ("parallel", 0), ("queue", -1), ("max_tokens", 0), ("max_body_mb", 0), ("grace", -1)])
def test_settings_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"{option} is {value}; expected"):
        ServeConfig(Path("bundle"), **{option: value})


def test_a_taken_port_is_one_line(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "masters.cli", "serve", str(bundle), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "choose another --host or --port" in line


def test_images_of_many_pixels_are_within_reach(server: Running) -> None:
    """Just below the limit: answered, and soon."""
    file = io.BytesIO()
    Image.new("L", (4400, 4400)).save(file, "PNG")
    start = time.monotonic()
    status, answer = server.ask(messages=image_url(data_url(file.getvalue())), max_tokens=1)
    assert status == 200, answer
    assert time.monotonic() - start < 5
