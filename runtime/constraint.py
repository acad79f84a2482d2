"""Answers that must be a value: one of some choices, what a regular expression matches, or JSON of a schema.

At each step a guide says which tokens keep a valid answer possible; whatever chooses then, greedily or by chance, chooses among them. Choices need
nothing but the tokenizer; patterns and schemas are read by a grammar library (grammar.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from ..errors import DataError, RecipeError
from .detokenize import TokenBytes

# What many models write before the first word of an answer; it is no part of the value.
LEAD = " "


@dataclass(frozen=True)
class Constraint:
    """What an answer must be; exactly one of the three is set. Raises RecipeError otherwise."""

    choices: tuple[str, ...] | None = None  # the whole answer is one of these
    pattern: str | None = None  # a regular expression that matches the whole answer, without look-around and back-references
    json_schema: str | None = None  # as JSON; a true schema is any JSON

    def __post_init__(self) -> None:
        given = [name for name in ("choices", "pattern", "json_schema") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(f"an answer is constrained by {' and '.join(given) or 'nothing'}; expected one of choices, pattern and json_schema")
        if self.choices is not None and (not self.choices or not all(self.choices)):
            raise RecipeError(f"choices holds {'an empty text' if self.choices else 'nothing'}; expected at least one text, each of at least one character")
        for text in self.choices or (self.pattern or self.json_schema or "",):
            if text != text.encode("utf-8", "replace").decode():
                raise RecipeError(f"{given[0]} holds half of a surrogate pair, which is no character; expected valid Unicode")


def read_constraint(
    choices: Sequence[str] | None = None, pattern: str | None = None, json_schema: Mapping[str, Any] | bool | str | None = None
) -> Constraint | None:
    """The constraint that these make, None for none. Raises RecipeError for several, and for what is no text or no JSON."""
    if choices is None and pattern is None and json_schema is None:
        return None
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices or ()):
        raise RecipeError("choices is no list of texts; expected one such as ['yes', 'no']")
    try:
        schema = json_schema if isinstance(json_schema, str | None) else json.dumps(json_schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"json_schema can't be written as JSON ({error}); expected a JSON schema as a dict") from None
    return Constraint(None if choices is None else tuple(choices), pattern, schema)


class Guide(Protocol):
    """Which tokens may come next; for one answer."""

    @property
    def lead(self) -> bool:
        """Whether a space before the value is let through, so that it has to be taken off."""

    @property
    def done(self) -> bool:
        """Whether the value is complete and nothing can follow."""

    def allowed(self) -> np.ndarray:
        """bool [vocab], end tokens included where the value may end. Raises DataError where nothing may follow."""

    def push(self, token: int) -> None:
        """The token that was chosen, no end token."""


class Vocabulary:
    """What each token of a model adds to a text, as bytes, and the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        """`size` is the length of the model's logits, which may be more than the tokenizer knows."""
        self.tokenizer, self.ends = tokenizer, list(ends)
        self.spelt = list(map(TokenBytes(tokenizer), range(size)))
        self.by_bytes: dict[bytes, list[int]] = {}
        for token, piece in enumerate(self.spelt):
            if piece:
                self.by_bytes.setdefault(piece, []).append(token)
        self.longest = max(map(len, self.by_bytes))
        self.spaced = [token for token, piece in enumerate(self.spelt) if piece.startswith(LEAD.encode())]


class ChoiceGuide:
    """Lets through any spelling of the choices in tokens."""

    def __init__(self, choices: Sequence[str], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.lead = not any(choice.startswith(LEAD) for choice in choices)
        # What can still follow, for each choice that is still possible.
        self._rests = {(lead + choice).encode() for choice in choices for lead in (("", LEAD) if self.lead else ("",))}

    @property
    def done(self) -> bool:
        return self._rests == {b""}

    def allowed(self) -> np.ndarray:
        known = self.vocabulary
        begin = {rest[:size] for rest in self._rests for size in range(1, min(len(rest), known.longest) + 1)}
        found = np.zeros(len(known.spelt), bool)
        found[[token for piece in begin for token in known.by_bytes.get(piece, ())]] = True
        found[known.ends] = b"" in self._rests
        if not found.any():
            raise DataError("no token of this model spells what must follow in the choices; expected texts that its tokenizer can write")
        return found

    def push(self, token: int) -> None:
        piece = self.vocabulary.spelt[token]
        self._rests = {rest[len(piece) :] for rest in self._rests if rest.startswith(piece)}
