"""The server's endpoints: OpenAI's chat completions, models, health, metrics, and the page. Every error is JSON of OpenAI's form with a reason."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import DataError, RecipeError, RequestError
from .completion import Completion, error_object, refusal
from .detokenize import TokenBytes
from .jobs import End, Event, Job, Jobs, Piece
from .metrics import Metrics
from .request import Limits, Request, read_request, show
from .session import Vlm

BODY_SECONDS = 30  # for a client to send what it has begun
DISCARD_SECONDS = 5  # for reading what a refused client still sends, so that it sees the refusal
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions")
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"))

Result = TypeVar("Result")


@dataclass
class Talk:
    """The two ends of one request: its job, and the events that come from the model thread."""

    completion: Completion
    request: Request
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    finished: bool = False  # the job has said all it has to say

    async def next(self) -> Piece | End:
        """Raises what the job failed with; a refusal of the session becomes a RequestError."""
        event = await self.events.get()
        self.finished = isinstance(event, Exception) or (isinstance(event, End) and event.index == self.request.n - 1)
        if isinstance(event, DataError | RecipeError):
            raise RequestError(" ".join(str(event).split()), param="messages")
        if isinstance(event, Exception):
            raise event
        return event

    async def whole(self) -> dict[str, Any]:
        ends: list[End] = []
        while not self.finished:
            event = await self.next()
            if isinstance(event, End):
                ends.append(event)
        return self.completion.whole([end.answer for end in ends], self.request.token_ids)

    async def lines(self, event: Piece | End) -> AsyncIterator[bytes]:
        """The stream's lines, beginning with `event`; an error in its midst is its last line."""
        ends: list[End] = []
        begun = -1
        while True:
            if event.index != begun:
                begun = event.index
                yield self._line(self.completion.begin(begun))
            if isinstance(event, Piece):
                yield self._line(self.completion.piece(event.index, event.text, event.logprobs))
            else:
                yield self._line(self.completion.end(event.index, event.answer))
                ends.append(event)
            if self.finished:
                break
            try:
                event = await self.next()
            except RequestError as error:
                yield _sse(refusal(error))
                return
            except Exception:
                yield _sse(error_object("the server failed while it answered; its log says why"))
                raise
        if self.request.include_usage:
            yield _sse(self.completion.bill([end.answer for end in ends]))
        yield b"data: [DONE]\n\n"

    def _line(self, chunk: dict[str, Any]) -> bytes:
        return _sse(chunk | {"usage": None} if self.request.include_usage else chunk)


class Service:
    """One model behind HTTP."""

    def __init__(self, vlm: Vlm, limits: Limits, jobs: Jobs, api_key: str | None, body_bytes: int) -> None:
        self.vlm, self.limits, self.jobs, self.body_bytes = vlm, limits, jobs, body_bytes
        self.metrics = Metrics(lambda: jobs.waiting, lambda: jobs.running)
        self.spell = TokenBytes(vlm.format.tokenizer)
        self.started = int(time.time())
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self._page = Path(__file__).with_name("page.html").read_bytes()
        self._policy = content_policy(self._page.decode())

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        errors: dict[Any, Any] = {RequestError: _refuse, HTTPException: _refuse_route, ClientDisconnect: _gone, Exception: _fail}
        return Starlette(routes=routes, exception_handlers=errors, middleware=[Middleware(Edge, metrics=self.metrics)])

    async def page(self, request: HttpRequest) -> Response:
        return Response(self._page, media_type="text/html", headers={"content-security-policy": self._policy})

    async def health(self, request: HttpRequest) -> Response:
        draining = self.jobs.draining
        return _json({"status": "shutting down" if draining else "ok", "model": self.limits.model}, 503 if draining else 200)

    async def show_metrics(self, request: HttpRequest) -> Response:
        self._admit(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        self._admit(request)
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        self._admit(request)
        if request.path_params["name"] != self.limits.model:
            raise RequestError(f"the model {show(request.path_params['name'])} is not here; this server has '{self.limits.model}'", 404, code="model_not_found")
        return _json(self._model())

    async def complete(self, request: HttpRequest) -> Response:
        """Read, check, wait in line, answer; a client that goes away takes its request with it."""
        self._admit(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also what a page on another site can't send without asking first.
            raise RequestError("the Content-Type is not application/json; expected a JSON body, declared as such", status=415)
        self.jobs.enter()
        try:
            body = await self._body(request)
            asked = await asyncio.to_thread(read_request, body, self.limits)
            talk = Talk(Completion(self.limits.model, self.spell), asked)
            job = Job(self.vlm, asked, self.spell, self.metrics, _emitter(talk.events))
        except BaseException:
            self.jobs.leave()
            raise
        self.jobs.start(job)
        try:
            if not asked.stream:
                return _json(await _unless_gone(request, talk.whole()))
            # Headers wait for the first piece: until then a refusal can still have its own status.
            return Events(job, talk, await _unless_gone(request, talk.next()))
        except (ClientDisconnect, asyncio.CancelledError) as error:
            self.metrics.cancelled()
            job.cancel(RequestError("the client is gone", status=499) if isinstance(error, ClientDisconnect) else ClientDisconnect())
            raise

    def _admit(self, request: HttpRequest) -> None:
        """With a key, only who has it; without, only who calls this machine by its own name: a rebound domain is another site's page."""
        if self._key is None:
            host = request.headers.get("host", "")
            if not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
                raise RequestError(f"the Host header says {show(host)}; expected localhost or 127.0.0.1, or start the server with an API key", status=403)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(hashlib.sha256(given.strip().encode()).digest(), self._key)
        if scheme.lower() != "bearer" or not right:
            found = "a wrong API key" if given else "no API key"
            raise RequestError(f"{found}; expected 'Authorization: Bearer KEY' with the key that the server was started with", 401, code="invalid_api_key")

    async def _body(self, request: HttpRequest) -> bytes:
        limit = f"at most {self.body_bytes / 1e6:.0f} MB are taken, send fewer or smaller images"
        if int(request.headers.get("content-length", 0)) > self.body_bytes:
            raise RequestError(f"the body has {int(request.headers['content-length']) / 1e6:.0f} MB; {limit}", status=413)
        pieces, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.body_bytes:
                        raise RequestError(f"the body is too large; {limit}", status=413)
                    pieces.append(piece)
        except TimeoutError:
            raise RequestError(f"the body was not here after {BODY_SECONDS} seconds; send it at once", status=408) from None
        request.state.read = True
        return b"".join(pieces)

    def _model(self) -> dict[str, Any]:
        return {"id": self.limits.model, "object": "model", "created": self.started, "owned_by": "masters"}


class Events(StreamingResponse):
    """Server-sent events of a job, which ends with them."""

    def __init__(self, job: Job, talk: Talk, first: Piece | End) -> None:
        # Proxies that buffer would make one lump of the stream.
        super().__init__(talk.lines(first), media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.job, self.talk = job, talk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.talk.finished:
                self.job.metrics.cancelled()
                self.job.cancel(RequestError("the client is gone", status=499))


class Edge:
    """Around all routes: headers on every response, and a count of each."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
                # Of unknown paths there are endless many.
                self.metrics.response(scope["path"] if scope["path"] in PATHS else "other", message["status"])
            await send(message)

        await self.app(scope, receive, send_on if scope["type"] == "http" else send)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which exactly this page's own script and style run, and it talks to this server alone."""
    hashes = {tag: _hashes(page, tag) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def _emitter(events: asyncio.Queue[Event]) -> Any:
    """Puts events in the queue from any thread; after the loop's end there is nobody left to tell."""
    loop = asyncio.get_running_loop()

    def emit(event: Event) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return emit


async def _unless_gone(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """What `work` gives. Raises ClientDisconnect if the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _discard(request: HttpRequest) -> None:
    """Read the rest of a body for a while and drop it: a client that is cut off while it sends never reads the answer."""
    if not getattr(request.state, "read", False):
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while (await request.receive()).get("more_body"):
                    pass


async def _refuse(request: HttpRequest, error: RequestError) -> Response:
    await _discard(request)
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    return _json(refusal(error), error.status, headers | ({"www-authenticate": "Bearer"} if error.status == 401 else {}))


async def _refuse_route(request: HttpRequest, error: HTTPException) -> Response:
    await _discard(request)
    found = f"{request.method} {show(request.url.path)}: {error.detail}"
    return _json(refusal(RequestError(f"{found}; expected GET {', '.join(PATHS[:-1])} or POST {PATHS[-1]}", error.status_code)), error.status_code)


async def _gone(request: HttpRequest, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _fail(request: HttpRequest, error: Exception) -> Response:
    return _json(error_object("the server failed; its log says why"), 500)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_dump(value), status, headers, "application/json")


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
