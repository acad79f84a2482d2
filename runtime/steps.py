"""The decoder's steps after a prompt: one token a run, or, by prompt lookup, several at once where an answer repeats what was said before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) guesses that what followed the last tokens the last time will follow again.
The guess is run together with the newest token, which costs little more than the token alone; as long as the answer goes on as guessed, its logits
are there already. Whatever chooses the tokens chooses from the logits of the same text as ever, so that the answer is the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .graphs import Parts, ResizableCache

LONGEST, SHORTEST = 3, 2  # tokens that have to have come before in the same order; one alone comes again by chance


@dataclass
class Context:
    """The decoder's cache and what is in it: token ids, an image's key in the place of its tokens. The cache may hold guesses beyond them."""

    cache: Any = None
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    prompt: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # the keys of the last prompt
    logits: np.ndarray | None = None  # and what followed it, float32 [vocab]


@runtime_checkable
class AppendingParts(Protocol):
    """An engine that gives the logits of several positions at once."""

    def append(self, embeds: np.ndarray, cache: Any, positions: np.ndarray | None = None, keep: int = 1) -> np.ndarray:
        """As Parts.decode, but logits float32 [keep, vocab] of the last `keep` positions."""


class Steps:
    """The steps of one answer on `context`, whose prompt has been run; with `ahead` tokens at most guessed at once, where the engine can."""

    def __init__(self, parts: Parts, context: Context, prompt: np.ndarray, budget: int, ahead: int = 0) -> None:
        """`prompt` int64 [S] and `budget`, the most tokens of the answer, for which the cache has room."""
        self._parts, self._context, self._prompt, self._budget = parts, context, prompt, budget
        self._most = self._size = ahead if isinstance(parts, AppendingParts) and isinstance(context.cache, ResizableCache) else 0
        self._guess: list[int] = []  # tokens that have been run before their time,
        self._rows: list[np.ndarray] = []  # and the logits after each
        self.guessed = 0  # tokens that came as guessed

    def after(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [vocab] after the answer's `tokens`, of which only the last is new."""
        context = self._context
        context.keys = np.append(context.keys, tokens[-1])
        if self._guess and self._guess[0] == tokens[-1]:
            self.guessed += 1
            del self._guess[0]
            return self._rows.pop(0)
        if not self._most:
            return self._parts.decode(self._parts.embed(np.array(tokens[-1:], np.int64)), context.cache)
        return self._run(tokens)

    def _run(self, tokens: Sequence[int]) -> np.ndarray:
        """The newest token and a new guess."""
        assert isinstance(self._parts, AppendingParts)
        # A wrong guess is forgotten, and the next one is shorter; after a right one it is longer.
        self._context.cache.keep(len(self._context.keys) - 1, 0)
        self._size = max(1, self._size // 2) if self._guess else min(self._most, 2 * self._size)
        self._guess = guess(np.append(self._prompt, tokens), min(self._size, self._budget - len(tokens)))
        ids = np.array([tokens[-1], *self._guess], np.int64)
        rows = self._parts.append(self._parts.embed(ids), self._context.cache, None, len(ids))
        # Copied: the engine may hand out its own memory.
        self._rows = [row.copy() for row in rows[1:]]
        return rows[0]


def guess(seen: np.ndarray, most: int) -> list[int]:
    """At most `most` tokens that followed the last place in `seen` int64 [S] where its last few tokens stood before; [] where there is none."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        if most < 1 or len(seen) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(seen[:-1], size)
        places = np.flatnonzero((windows == seen[-size:]).all(axis=1))
        if places.size:
            start = int(places[-1]) + size
            return [int(token) for token in seen[start : start + most]]
    return []
