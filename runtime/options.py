"""What can be asked of an answer besides the question: how long it may get, where it ends, how its tokens are chosen, what it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from ..errors import RecipeError
from .constraint import Constraint, read_constraint
from .sampling import Sampling


@dataclass(frozen=True)
class Options:
    """How long an answer may get, where it ends, how its tokens are chosen, and what it must be."""

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    top_logprobs: int | None = None  # how many of the likeliest tokens to report at each place, besides the chosen one; None reports nothing
    constraint: Constraint | None = None
    lookup: int = 0  # tokens that may be guessed at once from what was said before; 0 is off

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if self.lookup < 0:
            raise RecipeError(f"lookup is {self.lookup}; expected 0 (off) or how many tokens may be guessed at once, such as 8")


class Wishes(TypedDict, total=False):
    """The keywords of `answer` and `stream`."""

    max_tokens: int  # 64
    stop: str | Sequence[str]  # the answer ends before the first of these
    greedy: bool  # overrides the temperature
    temperature: float  # 0, which is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    min_p: float  # 0 is off
    repetition_penalty: float  # 1 is off
    seed: int | None  # None draws a new one
    choices: Sequence[str]  # the answer is one of these
    pattern: str  # the answer matches this regular expression
    json_schema: Mapping[str, Any] | bool | str  # the answer is JSON of this schema
    lookup: int  # 0 is off; else so many tokens are guessed at once from the prompt and the answer so far: faster where the answer quotes them


def read_options(**wishes: Unpack[Wishes]) -> Options:
    """The options that these keywords mean. Raises RecipeError for a value out of range, TypeError for a keyword that nobody knows."""
    if unknown := set(wishes) - Wishes.__optional_keys__:
        raise TypeError(f"unknown option '{min(unknown)}'; expected some of {', '.join(Wishes.__annotations__)}")
    stop = wishes.get("stop", ())
    if wishes.get("greedy"):
        wishes["temperature"] = 0.0
    drawn = {name: wishes[name] for name in Sampling.__dataclass_fields__ if name in wishes}  # type: ignore[literal-required]
    constraint = read_constraint(wishes.get("choices"), wishes.get("pattern"), wishes.get("json_schema"))
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Options(wishes.get("max_tokens", 64), stops, Sampling(**drawn), constraint=constraint, lookup=wishes.get("lookup", 0))
