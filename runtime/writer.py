"""Writing one answer: from each step's logits to a token, from tokens to text, until something ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from .answer import Answer, Making
from .constraint import LEAD, ChoiceGuide, Constraint, Guide, Vocabulary
from .detokenize import TextStream
from .options import Options
from .sampling import choose, rank

if TYPE_CHECKING:
    from .grammar import Grammars
    from .session import Vlm


class Guides:
    """Makes guides for a model's constrained answers; the vocabulary is read for the first. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._known = (tokenizer, vocab_size, ends)
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint) -> Guide:
        """Raises RecipeError for a constraint that can't be read or met, MissingExtraError where it needs the grammar library."""
        with self._lock:
            if constraint.choices is not None:
                return ChoiceGuide(constraint.choices, self._vocabulary)
            return self._grammars.guide(constraint)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(*self._known)

    @cached_property
    def _grammars(self) -> Grammars:
        from .grammar import Grammars  # an extra

        return Grammars(self._vocabulary)


class Writer:
    """An answer in the making. `take` a step's logits until it is `over`, `finish`, and it is an `answer`."""

    def __init__(self, vlm: Vlm, prompt: np.ndarray, budget: int, options: Options, making: Making) -> None:
        """`prompt` int64 [S]; the answer gets at most `budget` tokens. Raises as `Guides.guide`."""
        self.prompt, self.budget, self.making, self.options = prompt, budget, making, options
        self._ends = set(vlm.manifest.generation["eos_token_ids"])
        self._rng = np.random.default_rng(options.sampling.seed)
        self._guide = vlm.guides.guide(options.constraint) if options.constraint else None
        lead = None if self._guide is None else LEAD if self._guide.lead else ""
        self._text = TextStream(vlm.format.tokenizer, options.stop, lead)
        self._shown: list[str] = []
        self.tokens: list[int] = []

    def take(self, logits: np.ndarray) -> str:
        """Choose the next token from logits [vocab]; the text that can be shown now, often ''."""
        token = self._choose(logits)
        self.tokens.append(token)
        self.making.clock.tokens.append(time.perf_counter())
        if token in self._ends:
            return ""
        if self._guide:
            self._guide.push(token)
        if self.options.top_logprobs is not None:
            self.making.logprobs.append(rank(logits, token, self.options.top_logprobs))
        return self._show(self._text.push(token))

    def over(self) -> str:
        """Why the answer ends here, '' if it goes on."""
        if not self.tokens:
            return "cancelled"  # before the first
        if self.tokens[-1] in self._ends or self._text.stopped or (self._guide and self._guide.done):
            return "stop"
        return "length" if len(self.tokens) == self.budget else "cancelled" if self.making.cancelled.is_set() else ""

    def finish(self) -> str:
        """The text that was held back."""
        return self._show(self._text.finish())

    def answer(self, guessed: int = 0) -> Answer:
        """The whole; `guessed` of its tokens were run before their time."""
        timings, logprobs = self.making.clock.timings(guessed), tuple(self.making.logprobs)
        return Answer("".join(self._shown), tuple(self.tokens), self.over(), len(self.prompt), timings, logprobs, guessed)

    def _choose(self, logits: np.ndarray) -> int:
        sampling = self.options.sampling
        if self._guide:
            logits = np.where(self._guide.allowed(), logits, -np.inf)
        seen = np.concatenate([self.prompt, np.array(self.tokens, np.int64)]) if sampling.repetition_penalty != 1 else self.prompt
        return choose(logits, seen, sampling, self._rng)

    def _show(self, piece: str) -> str:
        self._shown.append(piece)
        return piece
