"""Several questions at once, for evaluation: each is read alone, as ever, and all answers are then written together, a token of each a run.

Reading a prompt keeps a processor busy by itself; a single step of one answer mostly waits for the weights, which several answers can share. A place that
becomes free goes to the next question at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RecipeError
from ..images import ImageSource
from .answer import Answer, Making
from .chat import user_message
from .graphs import OnnxParts, SharedCache, present_name
from .options import Options
from .writer import Writer

if TYPE_CHECKING:
    from .session import Vlm

ROOM = 256  # positions by which the buffers grow

Question = tuple[str, Sequence[ImageSource]]  # its text and images


def answer_all(vlm: Vlm, questions: Iterable[Question], options: Options, system: str | None = None, at_once: int = 8) -> Iterator[Answer]:
    """The answers in the questions' order, `at_once` written together; where the engine or the bundle can't, one after the other.

    The tokens are those of each question asked alone, but for rounding: kernels for several rows may sum in another order. A step in an answer's
    timings is shared with the others that were written then. Prompt lookup does not take part. Raises RecipeError for `at_once` below 1, and
    while it runs what a stream raises.
    """
    if at_once < 1:
        raise RecipeError(f"at_once is {at_once}; expected at least 1 answer to be written at a time")
    if at_once > 1 and isinstance(vlm.parts, OnnxParts) and vlm.parts.shared:
        return _Batch(vlm, vlm.parts, options, system, at_once).answers(questions)
    return (vlm.chat(system)._stream(question, images, options).answer for question, images in questions)


class Rows:
    """The caches of several answers in one buffer a tensor, [rows, kv_heads, capacity, head_dim], each row filled as far as its own length."""

    def __init__(self, parts: OnnxParts, rows: int) -> None:
        self._parts, self._rows, self._capacity = parts, rows, 0
        self._buffers: dict[str, np.ndarray] = {}
        # Free rows run along at length 0, and nobody reads what they say.
        self._lengths, self._shifts = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    def put(self, row: int, cache: SharedCache, capacity: int) -> None:
        """Take over an answer's prompt; it may grow to `capacity` positions."""
        if capacity > self._capacity:
            self._grow(-(-capacity // ROOM) * ROOM)
        for name, buffer in self._buffers.items():
            buffer[row, :, : cache.length] = cache.past[name][0, :, : cache.length]
        self._lengths[row], self._shifts[row] = cache.length, cache.shift

    def free(self, row: int) -> None:
        self._lengths[row] = self._shifts[row] = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append a token int64 [rows] to each row; logits float32 [rows, vocab]."""
        lengths, parts = self._lengths, self._parts
        positions = (lengths + self._shifts)[:, None]
        feeds: dict[str, np.ndarray] = {
            "inputs_embeds": np.ascontiguousarray(parts.embed(ids)[:, None], np.float32),
            "attention_mask": (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(np.broadcast_to(positions, (3, self._rows, 1))) if parts.axes else positions,
            "num_logits_to_keep": np.array(1, np.int64),
        }
        for name in feeds.keys() & parts.inputs:
            self._binding.bind_cpu_input(name, feeds[name])
        self._binding.bind_output("logits", "cpu")
        parts.decoder.run_with_iobinding(self._binding)
        lengths[lengths > 0] += 1
        return np.asarray(self._binding.get_outputs()[len(self._buffers)].numpy()[:, -1], np.float32)

    def _grow(self, capacity: int) -> None:
        self._binding = self._parts.decoder.io_binding()
        for name, empty in self._parts.empty.items():
            buffer = np.zeros((self._rows, empty.shape[1], capacity, empty.shape[3]), empty.dtype)
            if name in self._buffers:
                buffer[:, :, : self._capacity] = self._buffers[name]
            self._buffers[name] = buffer
            place = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(present_name(name), *place)
        self._capacity = capacity


class _Batch:
    """The answers being written, a row each."""

    def __init__(self, vlm: Vlm, parts: OnnxParts, options: Options, system: str | None, at_once: int) -> None:
        self._vlm, self._options, self._system = vlm, options, system
        self._rows = Rows(parts, at_once)
        self._writers: list[tuple[int, Writer] | None] = [None] * at_once  # each with its question's place
        self._done: dict[int, Answer] = {}

    def answers(self, questions: Iterable[Question]) -> Iterator[Answer]:
        waiting, given = iter(enumerate(questions)), 0
        while True:
            for row in range(len(self._writers)):
                self._fill(row, waiting)
            while given in self._done:
                yield self._done.pop(given)
                given += 1
            if not any(self._writers):
                return
            self._step()

    def _fill(self, row: int, waiting: Iterator[tuple[int, Question]]) -> None:
        """Begin questions in a free row until one has more than a first token to say."""
        while self._writers[row] is None and (following := next(waiting, None)):
            place, (question, images) = following
            chat = self._vlm.chat(self._system)
            messages, pictures = [*chat.messages, user_message(question, len(images))], list(chat.pictures)
            writer, _ = chat._prepare(messages, pictures, images, self._options, Making())
            writer.take(chat._prefill(writer.prompt, pictures, len(writer.prompt), writer.making.clock))
            if not self._end(place, writer):
                self._rows.put(row, chat.context.cache, len(writer.prompt) + writer.budget)
                self._writers[row] = place, writer

    def _step(self) -> None:
        ids = np.array([one[1].tokens[-1] if one else 0 for one in self._writers], np.int64)
        logits = self._rows.step(ids)
        for row, one in enumerate(self._writers):
            if one:
                place, writer = one
                writer.take(logits[row])
                if self._end(place, writer):
                    self._writers[row] = None
                    self._rows.free(row)

    def _end(self, place: int, writer: Writer) -> bool:
        """Whether the answer is over; it is kept then."""
        if writer.over():
            writer.finish()
            self._done[place] = writer.answer()
        return place in self._done
