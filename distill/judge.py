"""Who judges, and the rule judge: a response is right if its sample's metric says so; an empty or a repetitive one is wrong whatever it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..samples import Sample
from ..scoring import score
from .endpoint import Endpoint

NAME = "rules"
RIGHT = 0.5  # of a metric that gives parts of 1
LONG = 12  # words from which a text can be called repetitive
WINDOW = 4


@dataclass(frozen=True)
class Judge:
    """Who decides whether an answer is right: the rules of the sample's metric, a model in this process, or an endpoint."""

    kind: str = "rules"
    model: Path | None = None  # of kind 'model': a Hugging Face folder; None: the unmasked teacher of the question
    endpoint: Endpoint = field(default_factory=Endpoint)
    max_tokens: int = 256  # of an explanation
    batch: int = 32  # answers that a model judges at once
    blind: str = "stop"  # what a run does before it trains on a judge that says yes, or no, to almost everything: stop, warn
    max_unjudged: float = 0.1  # the share of answers that may stay without a verdict; with more, the run stops before it trains


@dataclass(frozen=True)
class Verdict:
    """1 or 0, and why; `value` is None where there is no ground truth to judge by."""

    value: float | None
    reason: str
    judge: str = NAME


def judge(sample: Sample, text: str) -> Verdict:
    """The verdict on `text` as an answer to `sample`."""
    if not text.strip():
        return Verdict(0.0, "empty")
    if is_repetitive(text):
        return Verdict(0.0, "repetitive")
    if not sample.answers:
        return Verdict(None, "no ground truth")
    reached = score(sample, text)
    return Verdict(float(reached >= RIGHT), f"{sample.metric} {reached:.2f}")


def is_repetitive(text: str) -> bool:
    """Whether a text of a dozen words or more says the same few things over and over: under half of its runs of four words are distinct."""
    words = text.lower().split()
    if len(words) < LONG:
        return False
    runs = [tuple(words[i : i + WINDOW]) for i in range(len(words) - WINDOW + 1)]
    return len(set(runs)) < len(runs) / 2
