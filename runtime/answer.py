"""An answer: the pieces it comes in, what it is in the end, and where its time went."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from .memory import peak_rss_mb


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds."""

    image_preprocess: float  # decoding the files, resizing, tiling
    image_encode: float
    prefill: float  # embedding the prompt and running the decoder over it
    first_token: float  # from the call to the first token; the total where none came
    decode_per_token: float | None  # median, or the mean where tokens came by prompt lookup, several at once; None for an answer of one token
    total: float
    decode_steps: tuple[float, ...] = ()  # each token after the first
    peak_memory_mb: float | None = None  # the most that the process has held so far; None where the system doesn't say


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token that it gave, before temperature and filters, and which tokens it found likeliest: (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said. `token_ids` holds the end token where the model gave one; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop, length or cancelled
    prompt_tokens: int
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token but the end token, where they were asked for
    guessed: int = 0  # tokens that prompt lookup guessed right


@dataclass
class Clock:
    """The times of one answer as they come, in seconds."""

    start: float = field(default_factory=time.perf_counter)
    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    tokens: list[float] = field(default_factory=list)

    def timings(self, guessed: int = 0) -> Timings:
        typical = statistics.fmean if guessed else statistics.median
        steps = tuple(1000 * (after - before) for before, after in itertools.pairwise(self.tokens))
        now = time.perf_counter()
        return Timings(
            image_preprocess=1000 * self.preprocess,
            image_encode=1000 * self.encode,
            prefill=1000 * self.prefill,
            first_token=1000 * ((self.tokens[0] if self.tokens else now) - self.start),
            decode_per_token=typical(steps) if steps else None,
            total=1000 * (now - self.start),
            decode_steps=steps,
            peak_memory_mb=peak_rss_mb(),
        )


@dataclass
class Making:
    """An answer in the making: what the session that makes it and the stream that shows it share."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)


class Stream(Iterator[str]):
    """Pieces of an answer as they come. `answer` is the whole of it; `cancel` may be called from any thread and takes effect within a token.

    `logprobs` grows with the tokens, which may be ahead of the pieces.
    """

    def __init__(self, pieces: Generator[str, None, Answer], making: Making) -> None:
        self._pieces = pieces
        self._making = making
        self.logprobs = making.logprobs
        self._answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._answer = self._answer or end.value
            raise

    @property
    def answer(self) -> Answer:
        """The finished answer; what has not been read of it is generated first."""
        for _ in self:
            pass
        if self._answer is None:
            raise RuntimeError("this stream failed or was closed before its end")
        return self._answer

    def cancel(self) -> None:
        self._making.cancelled.set()
