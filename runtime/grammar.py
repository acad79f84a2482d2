"""Regular expressions and JSON schemas as guides, by the library llguidance (the 'grammar' extra): it walks the grammar and the vocabulary together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..errors import DataError, RecipeError, missing_extra
from .constraint import LEAD, Constraint, Vocabulary

# As Python's json.dumps writes: models know it, and free white space is where small ones never find an end.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

NOTHING = "NoExtension"  # how the library says that no token can follow, at once or after some search


def check_grammar(constraint: Constraint) -> None:
    """Raise RecipeError for a pattern or schema that can't be read, has a part that is not supported, or that nothing satisfies; without a model."""
    library = _library()
    if fault := library.LLMatcher.validate_grammar(_grammar(constraint, False)):
        raise _refusal(constraint, fault)


class Grammars:
    """The grammars of one model: its vocabulary in the library's form, made once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        library = self._library = _library()
        self.vocabulary = vocabulary
        self._tokens = library.LLTokenizer(library.TokenizerWrapper(_Words(vocabulary)), n_vocab=len(vocabulary.spelt), eos_token=vocabulary.ends)

    def guide(self, constraint: Constraint) -> GrammarGuide:
        """A guide for one answer. Errors as for `check_grammar`."""
        bare = GrammarGuide(self._matcher(constraint, False), constraint, self.vocabulary, False)
        if bare.allowed()[self.vocabulary.spaced].any():
            return bare  # the value itself may begin with a space
        return GrammarGuide(self._matcher(constraint, True), constraint, self.vocabulary, True)

    def _matcher(self, constraint: Constraint, lead: bool) -> Any:
        matcher = self._library.LLMatcher(self._tokens, _grammar(constraint, lead), log_level=0)
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        return matcher


class GrammarGuide:
    """One walk through a grammar."""

    def __init__(self, matcher: Any, constraint: Constraint, vocabulary: Vocabulary, lead: bool) -> None:
        self.lead = lead
        self._matcher, self._constraint, self._size, self._ends = matcher, constraint, len(vocabulary.spelt), vocabulary.ends
        self._begun = False

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        found = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), count=self._size, bitorder="little").astype(bool)
        if not self._begun and self._matcher.get_error().startswith(NOTHING):
            raise _refusal(self._constraint, "nothing satisfies it")
        self._check()
        found[self._ends] = self._matcher.is_accepting()
        return found

    def push(self, token: int) -> None:
        self._begun = True
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"the grammar library gave up ({_first_line(self._matcher.get_error())}); expected a simpler pattern or schema")


class _Words:
    """A vocabulary as the library asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.eos_token_id = vocabulary.spelt, vocabulary.ends[0]
        self.special_token_ids = [token for token, piece in enumerate(vocabulary.spelt) if not piece]
        self._tokenizer = vocabulary.tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return list(self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids)


def _grammar(constraint: Constraint, lead: bool) -> str:
    """The constraint in the library's language, with `lead` for a value that a space may stand before."""
    if constraint.pattern is not None:
        value = f"/{_library().regex_to_lark(constraint.pattern, use_ascii='')}/"
    else:
        value = f"%json {_schema(constraint.json_schema or '')}"
    return f"start: {_quoted(LEAD) + '? ' if lead else ''}value\nvalue: {value}"


def _schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"json_schema is no JSON ({_first_line(str(error))}); expected a JSON schema") from None
    if not isinstance(schema, dict | bool):
        raise RecipeError(f"json_schema is {type(schema).__name__}; expected an object such as {{'type': 'integer'}}")
    if schema is False:
        raise RecipeError("the JSON schema is false, which nothing satisfies; expected one that some value satisfies")
    return json.dumps(({} if schema is True else schema) | {"x-guidance": JSON_FORM})


def _quoted(text: str) -> str:
    return json.dumps(text)


def _refusal(constraint: Constraint, fault: str) -> RecipeError:
    what, expected = (
        ("regular expression", "one without look-around and back-references") if constraint.pattern is not None else ("JSON schema", "a simpler one")
    )
    return RecipeError(f"the {what} can't be used ({_first_line(fault)}); expected {expected} that some text satisfies")


def _first_line(text: str) -> str:
    """What is wrong, of a report that may show the place over several lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else "no reason given")
    return told.rpartition("failed to compile JSON schema: ")[2][:200]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise missing_extra("llguidance", "grammar") from None
    return llguidance
