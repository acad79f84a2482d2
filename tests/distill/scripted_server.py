"""A real HTTP server that answers chat completions as a test wants: whole, wrong, half or never. It notes what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HALF, NOTHING, DROP = "half", "nothing", "drop"  # what a script may say in place of a status: the body breaks off, nothing comes, the connection closes


@dataclass
class Scripted:
    """`script(request, count)` gives status and body (an object, or bytes) for the `count`th request, from 1 on."""

    script: Callable[[dict[str, Any], int], tuple[Any, Any]]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    posted: list[str] = field(default_factory=list)
    most: int = 0  # requests under way at once
    under_way: int = 0
    retry_after: int = 0  # seconds, said with 429
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


def completion(*texts: str, finish: str = "stop", prompt: int = 1, **more: Any) -> dict[str, Any]:
    """A body with one choice a text."""
    choices = [{"index": i, "finish_reason": finish, "message": {"role": "assistant", "content": text}, **more} for i, text in enumerate(texts)]
    return {"id": "x", "object": "chat.completion", "choices": choices, "usage": {"prompt_tokens": prompt}}


@contextmanager
def serve_script(script: Callable[[dict[str, Any], int], tuple[Any, Any]]) -> Iterator[Scripted]:
    found = Scripted(script)

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if not self.path.endswith("/chat/completions"):
                found.posted.append(self.path)
                self.reply(404, b"{}")
                return
            with found.lock:
                request = json.loads(body)
                found.requests.append(request)
                found.headers.append({name.lower(): value for name, value in self.headers.items()})
                found.under_way += 1
                found.most = max(found.most, found.under_way)
                count = len(found.requests)
            try:
                self.play(*found.script(request, count))
            finally:
                with found.lock:
                    found.under_way -= 1

        def play(self, status: Any, answer: Any) -> None:
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            if status == NOTHING:
                found.closing.wait(60)
                self.close_connection = True
            elif status == DROP:
                self.close_connection = True
            elif status == HALF:
                self.reply(200, raw[: len(raw) // 2], length=len(raw))
                self.close_connection = True
            else:
                self.reply(status, raw)

        def reply(self, status: int, raw: bytes, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            if status == 429 and found.retry_after:
                self.send_header("retry-after", str(found.retry_after))
            self.send_header("content-length", str(len(raw) if length is None else length))
            self.end_headers()
            self.wfile.write(raw)
            self.wfile.flush()

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a client that went away
            pass

    server = Server(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield found
    finally:
        found.closing.set()
        server.shutdown()
        server.server_close()


def slowly(seconds: float, answer: Callable[[dict[str, Any]], tuple[Any, Any]]) -> Callable[[dict[str, Any], int], tuple[Any, Any]]:
    """A script that takes its time."""

    def script(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        time.sleep(seconds)
        return answer(request)

    return script
