"""Requests on their way through the model: a bounded line before a few model threads, so that the event loop never computes."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import RequestError
from .answer import Answer, Stream, TokenLogprob
from .completion import Covered
from .detokenize import TokenBytes
from .metrics import Metrics
from .request import Request
from .session import Context, Options, Vlm


@dataclass(frozen=True)
class Piece:
    """Some text of the choice `index`, and the tokens that begin in it if they were asked for."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class End:
    """The choice `index` is complete."""

    index: int
    answer: Answer


Event = Piece | End | Exception
# Until the first answers have been timed.
FIRST_GUESS = 1.0


class Job:
    """One request. `run` tells `emit` its pieces and ends, in order, or, once and last, what went wrong."""

    def __init__(self, vlm: Vlm, request: Request, spell: TokenBytes, metrics: Metrics, emit: Callable[[Event], None]) -> None:
        self.vlm, self.request, self.spell, self.metrics, self.emit = vlm, request, spell, metrics, emit
        self.arrived = time.perf_counter()
        self.future: Future[None] | None = None
        self._stream: Stream | None = None
        self._cancelled: Exception | None = None

    def cancel(self, reason: Exception) -> None:
        """Stop within a token, or before the start; from any thread. Does nothing to a job that is done."""
        self._cancelled = self._cancelled or reason
        if self._stream:
            self._stream.cancel()
        if self.future and self.future.cancel():
            self.emit(self._cancelled)

    def run(self) -> None:
        """In a model thread: answer as many times as was asked."""
        try:
            context = Context()
            for index in range(self.request.n):
                self._answer(index, context)
            self.metrics.done(time.perf_counter() - self.arrived)
        except Exception as error:  # the other side of the queue decides what is a refusal and what a bug
            self.emit(error)

    def _answer(self, index: int, context: Context) -> None:
        stream = self._stream = self.vlm.reply(self.request.messages, self.request.images, _choice(self.request.options, index), context)
        covered, shown = Covered(self.spell), ""
        # After the stream is in its place: a cancel from now on reaches it, an earlier one is seen here.
        if self._cancelled:
            raise self._cancelled
        for text in stream:
            if not shown and not index:
                self.metrics.first_token(time.perf_counter() - self.arrived)
            shown += text
            self.emit(Piece(index, text, covered.grow(stream.logprobs, shown)))
        self.metrics.answer(stream.answer, again=index > 0)
        if self._cancelled:
            raise self._cancelled
        self.emit(End(index, stream.answer))


class Jobs:
    """The line: `parallel` requests run, `waiting` more may wait, the next one is refused."""

    def __init__(self, parallel: int, waiting: int) -> None:
        self.parallel, self.capacity = parallel, parallel + waiting
        self.draining = False  # refuse what is new, finish what is here
        self.held = 0  # requests that are being read, wait or run
        self._running: set[Job] = set()
        self._waiting: set[Job] = set()
        self._seconds = FIRST_GUESS  # a request's time in its thread, a moving average
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="model")

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self.held - len(self._running)

    @property
    def started(self) -> int:
        return len(self._waiting) + len(self._running)

    def enter(self) -> None:
        """Take a place, before a request's body is read: the bound holds for memory too. Raises RequestError if there is none."""
        with self._lock:
            if self.draining:
                raise RequestError("the server is shutting down; ask another one, or this one again later", status=503, code="shutting_down", retry_after=5)
            if self.held >= self.capacity:
                found = f"{self.held} requests are here already, {self.parallel} of them running"
                raise RequestError(f"{found}; send this one again in a while", status=429, code="queue_full", retry_after=self._wait())
            self.held += 1

    def leave(self) -> None:
        with self._lock:
            self.held -= 1

    def start(self, job: Job) -> None:
        """Put a request that has entered in line; it leaves by itself."""
        with self._lock:
            self._waiting.add(job)
        job.future = self._threads.submit(self._run, job)
        job.future.add_done_callback(lambda future: self._done(job))

    def cancel_all(self, reason: Exception) -> None:
        with self._lock:
            jobs = [*self._waiting, *self._running]
        for job in jobs:
            job.cancel(reason)

    def _run(self, job: Job) -> None:
        start = time.perf_counter()
        with self._lock:
            self._waiting.discard(job)
            self._running.add(job)
        try:
            job.run()
        finally:
            with self._lock:
                self._running.discard(job)
                self._seconds += 0.2 * (time.perf_counter() - start - self._seconds)

    def _done(self, job: Job) -> None:
        with self._lock:
            self._waiting.discard(job)
        self.leave()

    def _wait(self) -> int:
        """Seconds until one of those who are here has probably left."""
        return max(1, math.ceil(self._seconds / self.parallel))


def _choice(options: Options, index: int) -> Options:
    """The options of a request's choice `index`: each has a seed of its own, the first one the request's."""
    seed = options.sampling.seed
    return options if seed is None else dataclasses.replace(options, sampling=dataclasses.replace(options.sampling, seed=seed + index))
