"""`masters serve`: a bundle behind HTTP, with OpenAI's chat completions and a page to try it.

By default only this machine reaches it; another address needs an API key. SIGTERM or Ctrl-C: new requests get a 503, those that are here
are finished, then the process ends with 0.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RecipeError, RequestError
from ..images import MAX_PIXELS
from ..progress import say
from .jobs import Jobs
from .memory import MB
from .request import Limits
from .service import Service, is_loopback
from .session import Vlm

HEAD_SECONDS = 30  # for a client that has connected to send its request's head
LEAVE_SECONDS = 5  # for clients to take the ends of their answers when the server stops


@dataclass(frozen=True)
class ServeConfig:
    """Where to serve which bundle to whom, and how much a client may ask. Raises RecipeError for a value out of range."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    api_key: str | None = field(default=None, repr=False)
    name: str | None = None  # of the model; None is the folder's
    parallel: int = 1  # model threads
    queue: int = 16  # requests that may wait for one
    max_tokens: int = 512  # of an answer whose request names no length
    max_images: int = 16  # of one request
    max_megapixels: float = MAX_PIXELS / 1e6  # of one request's images together
    max_body_mb: float = 32.0
    image_cache_mb: float = 256.0  # of features of images that were sent before; 0 remembers none
    grace: float = 30.0  # seconds for what runs when the server is told to stop
    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("port", 0 <= self.port < 2**16, "0 (any free one) to 65535"),
            ("parallel", self.parallel >= 1, "at least 1"),
            ("queue", self.queue >= 0, "0 or more"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("max_images", self.max_images >= 1, "at least 1"),
            ("max_megapixels", self.max_megapixels > 0, "more than 0"),
            ("max_body_mb", self.max_body_mb > 0, "more than 0"),
            ("image_cache_mb", self.image_cache_mb >= 0, "0 (off) or more"),
            ("grace", self.grace >= 0, "0 or more seconds"),
        ):
            if not holds:
                raise RecipeError(f"{name} is {getattr(self, name)}; expected {wanted}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip() == self.api_key != ""):
            raise RecipeError("the API key is empty or holds white space around it or letters that a header can't carry; expected printable ASCII")
        if not self.api_key and not is_loopback(self.host):
            raise RecipeError(
                f"host is {self.host}, which other machines reach, and there is no API key; "
                "pass --api-key or set MASTERS_API_KEY, or stay on this machine with --host 127.0.0.1"
            )


def serve(config: ServeConfig, vlm: Vlm | None = None) -> None:
    """Serve until a signal says stop. `vlm` is the opened bundle; None opens it as ONNX. Raises MastersError if it can't begin."""
    # Before the bundle, which takes seconds: the port may be taken.
    with listen(config.host, config.port) as listener:
        if vlm is None:
            from . import load

            vlm = load(config.bundle, config.provider, config.threads)
        vlm.memory.room = int(config.image_cache_mb * MB)
        limits = limits_of(vlm, config)
        jobs = Jobs(config.parallel, config.queue)
        service = Service(vlm, limits, jobs, config.api_key, int(config.max_body_mb * 1e6))
        settings = uvicorn.Config(
            service.app(),
            loop="asyncio",
            http=Patient,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=LEAVE_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        say(f"serving {limits.model} at http://{f'[{host}]' if ':' in host else host}:{port} (page at /, API at /v1); Ctrl-C stops")
        Server(settings, jobs, config.grace).run(sockets=[listener])


def limits_of(vlm: Vlm, config: ServeConfig) -> Limits:
    context = vlm.manifest.decoder.context
    # No text can fit that is longer than the context filled with the longest token.
    longest = max(map(len, vlm.format.tokenizer.get_vocab()))
    name = config.name or config.bundle.resolve().name
    return Limits(name, context, context * longest, config.max_tokens, config.max_images, int(config.max_megapixels * 1e6))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RecipeError for an address that is not here or a port that is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise RecipeError(f"can't listen on {host} port {port} ({error.strerror or error}); choose another --host or --port, 0 takes a free one") from None


class Server(uvicorn.Server):
    """uvicorn's server with another end: refuse what is new while what is here finishes, for `grace` seconds at most."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs, grace: float) -> None:
        super().__init__(config)
        self.jobs, self.grace = jobs, grace
        self.deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one cuts it short. Neither is raised again afterwards: the end is a good one."""
        first = self.deadline is None
        self.jobs.draining = True
        self.deadline = time.monotonic() + (self.grace if first else 0)

    async def on_tick(self, counter: int) -> bool:
        if self.deadline is not None:
            late = time.monotonic() > self.deadline
            if late:
                self.jobs.cancel_all(RequestError("the server stopped before this answer was finished; ask again", status=503, code="shutting_down"))
            # A request that is still being read holds a place and has no job.
            if not (self.jobs.started if late else self.jobs.held):
                self.should_exit = True
        return await super().on_tick(counter)


class Patient(H11Protocol):
    """uvicorn's HTTP with an end to its patience: a connection on which no request begins is closed. What is written is sent at once."""

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        super().connection_made(transport)
        # asyncio does so itself only for sockets that name their protocol; without it each answer waits 40 ms for an acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.patience = self.loop.call_later(HEAD_SECONDS, lambda: transport.close() if self.cycle is None else None)

    def connection_lost(self, exc: Exception | None) -> None:
        # The timer would hold a connection's buffers until it fires: 100 MB under a few hundred requests a second.
        self.patience.cancel()
        super().connection_lost(exc)
