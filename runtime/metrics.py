"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics, generate_latest

from .answer import Answer

# Seconds: from a tiny model on a desktop to a large prompt on a small board.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHOLE = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own; threads may share them."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        # A time of birth beside every figure, which Prometheus itself ignores.
        disable_created_metrics()
        ProcessCollector(registry=self.registry)
        self._responses = Counter("masters_requests", "Responses by path and status code", ["path", "code"], registry=self.registry)
        self._prompt = Counter("masters_prompt_tokens", "Tokens read, images included", registry=self.registry)
        self._generated = Counter("masters_generated_tokens", "Tokens generated", registry=self.registry)
        self._cancelled = Counter("masters_cancelled", "Requests given up because the client went away", registry=self.registry)
        self._first = Histogram("masters_first_token_seconds", "From a request's arrival to its first text", buckets=FIRST_TOKEN, registry=self.registry)
        self._whole = Histogram("masters_answer_seconds", "From a request's arrival to the end of its answer", buckets=WHOLE, registry=self.registry)
        Gauge("masters_queue_length", "Requests that wait for a model thread", registry=self.registry).set_function(waiting)
        Gauge("masters_running", "Requests in a model thread", registry=self.registry).set_function(running)

    def response(self, path: str, code: int) -> None:
        self._responses.labels(path, str(code)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answer(self, answer: Answer, again: bool) -> None:
        """One choice; `again` for those after the first, which share its prompt."""
        self._prompt.inc(0 if again else answer.prompt_tokens)
        self._generated.inc(len(answer.token_ids))

    def done(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
