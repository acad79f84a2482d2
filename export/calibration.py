"""Questions that a quantisation is chosen or fitted by: the PyTorch student's own answers to them, and how far another version of it departs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..progress import bar
from ..samples import Sample, read_samples
from .reference import Prompt, encode, greedy
from .source import Source

QUESTIONS = 64  # of a file that are asked, spread evenly over it
ANSWER = 16  # tokens of an answer that are compared


@dataclass(frozen=True)
class Asked:
    """A question with the student's own greedy answer, tokens int64[n], and the logarithms of the probabilities at its places, float32[n, V]."""

    sample: Sample
    prompt: Prompt
    tokens: np.ndarray
    log_probabilities: torch.Tensor


def ask(source: Source, data: Path, count: int = QUESTIONS) -> list[Asked]:
    """Up to `count` questions of `data`, answered. Raises DataError for a file that can't be read; answers in it are not needed."""
    samples = read_samples(data, need_answers=False)
    chosen = [samples[i * len(samples) // count] for i in range(count)] if len(samples) > count else samples
    asked = []
    for sample in bar(chosen, "calibration questions"):
        prompt = encode(source, sample.prompt, sample.images)
        tokens, logits = greedy(source, prompt, ANSWER)
        asked.append(Asked(sample, prompt, tokens, torch.from_numpy(logits).log_softmax(-1)))
    return asked


def forward(source: Source, asked: Asked) -> torch.Tensor:
    """The model's logits float32[n, V] at the places of the answer, in one pass over prompt and answer."""
    if hasattr(source.model.model, "rope_deltas"):
        source.model.model.rope_deltas = None
    ids = torch.from_numpy(np.concatenate([asked.prompt.ids, asked.tokens[:-1]]))[None]
    # What marks the kind of a prompt's token marks an answer's as text.
    marks = {name: torch.nn.functional.pad(mark, (0, ids.shape[1] - mark.shape[1])) for name, mark in asked.prompt.marks.items()}
    with torch.no_grad():
        found = source.model(input_ids=ids, logits_to_keep=len(asked.tokens), use_cache=False, **asked.prompt.pixels, **marks)
    return torch.Tensor(found.logits[0].float())


def divergence(asked: Asked, logits: torch.Tensor) -> float:
    """KL(student, other) in nats, the mean over the answer's places, of the other's logits float32[n, V]."""
    theirs, ours = asked.log_probabilities.double(), logits.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean().clamp(min=0))


def mean_divergence(source: Source, questions: Sequence[Asked]) -> float:
    """The same of the model as it stands now, the mean over questions."""
    return sum(divergence(asked, forward(source, asked)) for asked in questions) / len(questions)


@contextmanager
def seen_once(source: Source, questions: Sequence[Asked]) -> Iterator[Callable[[Source, Sequence[Asked]], float]]:
    """mean_divergence for models that differ in the decoder alone: the features of each question's images are computed once and kept."""
    inner: Any = source.model.model
    compute, kept, current = inner.get_image_features, {}, [-1]

    def remembered(*arguments: Any, **named: Any) -> Any:
        if current[0] not in kept:
            kept[current[0]] = compute(*arguments, **named)
        return kept[current[0]]

    def measure(source: Source, questions: Sequence[Asked]) -> float:
        total = 0.0
        for current[0], asked in enumerate(questions):
            total += divergence(asked, forward(source, asked))
        return total / len(questions)

    inner.get_image_features = remembered
    try:
        yield measure
    finally:
        del inner.get_image_features
