"""The bounds of the queue, clients that go away, and the server's end: nothing is lost, nothing runs for nobody."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import Running, served_slowly

HI = [{"role": "user", "content": "hi"}]
LONG = 250  # tokens: five seconds of the slow model


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with served_slowly(bundle, "queue=1") as running:
        yield running
        assert "Traceback" not in running.log.read_text()


def begin(server: Running, **body: Any) -> http.client.HTTPResponse:
    """A request whose answer has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HI, "stream": True} | body), {"Content-Type": "application/json"})
    return connection.getresponse()


def send(server: Running, **body: Any) -> socket.socket:
    """A request whose answer is not awaited."""
    text = json.dumps({"messages": HI} | body).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    client.sendall(head.encode() + text)
    return client


def pieces(lines: list[bytes]) -> str:
    """The text in the lines of a stream."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_beyond_the_queue_a_429_says_when_to_come_back(server: Running) -> None:
    with begin(server, max_tokens=LONG) as running, send(server, max_tokens=1) as waiting:
        assert running.status == 200
        server.wait_for("masters_queue_length", 1)
        assert server.metric("masters_running") == 1
        status, headers, answer = server.request("POST", "/v1/chat/completions", json.dumps({"messages": HI}))
        error = json.loads(answer)["error"]
        assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(headers["retry-after"]) >= 1
        # A large body is read away, so that the client sees the refusal and no broken pipe.
        big = json.dumps({"messages": [{"role": "user", "content": "x" * 8_000_000}]})
        assert server.request("POST", "/v1/chat/completions", big)[0] == 429
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=client.models.list().data[0].id, messages=HI)  # type: ignore[arg-type]
        # Others are served meanwhile: the event loop is free.
        start = time.monotonic()
        assert server.request("GET", "/health")[0] == 200
        assert time.monotonic() - start < 1
        running.close()
        assert b"200 OK" in waiting.recv(100), "the one in the queue is answered once there is room"
    server.wait_for("masters_running", 0)
    assert server.metric("masters_requests_total", code="429") == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(stream: bool, server: Running) -> None:
    tokens, gone = server.metric("masters_generated_tokens_total"), server.metric("masters_cancelled_total")
    client = send(server, max_tokens=LONG, stream=stream)
    server.wait_for("masters_running", 1)
    time.sleep(0.2)
    client.close()
    start = time.monotonic()
    server.wait_for("masters_running", 0)
    assert time.monotonic() - start < 1
    assert 0 < server.metric("masters_generated_tokens_total") - tokens < LONG / 2
    assert server.metric("masters_cancelled_total") == gone + 1


def test_a_client_that_goes_away_leaves_the_queue(server: Running) -> None:
    with begin(server, max_tokens=LONG) as running:
        client = send(server, max_tokens=LONG)
        server.wait_for("masters_queue_length", 1)
        tokens = server.metric("masters_generated_tokens_total")
        client.close()
        server.wait_for("masters_queue_length", 0)
        running.close()
    server.wait_for("masters_running", 0)
    assert server.metric("masters_generated_tokens_total") - tokens < LONG, "both were answered to the end"


def test_sigterm_finishes_what_is_here_and_refuses_what_is_new(bundle: Path) -> None:
    with served_slowly(bundle, "queue=3") as server, begin(server, max_tokens=60) as running, ThreadPoolExecutor(1) as pool:
        first = running.readline() + running.readline() + running.readline()
        # What waits is finished too.
        waiting = pool.submit(server.ask, messages=HI, max_tokens=4)
        server.wait_for("masters_queue_length", 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, headers, answer = server.request("POST", "/v1/chat/completions", json.dumps({"messages": HI}))
        assert (status, json.loads(answer)["error"]["code"]) == (503, "shutting_down")
        assert headers["retry-after"]
        status, _, answer = server.request("GET", "/health")
        assert (status, json.loads(answer)["status"]) == (503, "shutting down")
        lines = first.splitlines() + running.read().splitlines()
        assert lines[-2] == b"data: [DONE]"
        assert json.loads([line for line in lines if line][-2][6:])["choices"][0]["finish_reason"] == "length"
        status, answer = waiting.result(30)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


def test_the_grace_ends(bundle: Path) -> None:
    """A second signal does not wait; what runs is told why it ends."""
    with served_slowly(bundle, "grace=60") as server, begin(server, max_tokens=LONG) as running, ThreadPoolExecutor(1) as pool:
        first = running.readline()
        waiting = pool.submit(server.ask, messages=HI, max_tokens=4)
        server.wait_for("masters_queue_length", 1)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        lines = [first.strip(), *filter(None, running.read().splitlines())]
        assert json.loads(lines[-1][6:])["error"]["code"] == "shutting_down"
        assert b"data: [DONE]" not in lines
        status, answer = waiting.result(30)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert server.process.wait(10) == 0


def test_an_idle_or_silent_client_does_not_hold_up_the_end(bundle: Path) -> None:
    """One has connected and says nothing, one has sent half a body, one asks for a stream and never reads it."""
    with served_slowly(bundle, "grace=0.5", delay=0.001) as server:
        silent = socket.create_connection(("127.0.0.1", server.port))
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        deaf = send(server, max_tokens=300, stream=True, n=4, logprobs=True, top_logprobs=20)
        server.wait_for("masters_running", 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        for client in (silent, half, deaf):
            client.close()


def test_two_model_threads_answer_at_once(bundle: Path) -> None:
    with served_slowly(bundle, "parallel=2", delay=0.05) as server:
        # The slow model sleeps: two at once take the time of one.
        assert server.ask(messages=HI, max_tokens=2)[0] == 200
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(server.ask, messages=HI, max_tokens=20) for _ in range(2)]
            server.wait_for("masters_running", 2, seconds=2)
            assert [answer.result()[0] for answer in answers] == [200, 200]


def test_what_a_stream_has_said_arrives_while_the_rest_is_made(server: Running) -> None:
    start = time.monotonic()
    with begin(server, max_tokens=50) as running:
        lines = [running.readline() for _ in range(12)]
        early = time.monotonic() - start
        lines += running.readlines()
        whole = time.monotonic() - start
    assert pieces(lines)
    assert early < whole / 2
