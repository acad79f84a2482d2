"""Scoring a model on questions: greedy answers, one score each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..progress import bar
from ..samples import Sample
from ..scoring import score
from .families import family_of
from .generate import GREEDY, Generated, batches_by_length, generate
from .inputs import Encoder


def greedy_answers(model: Any, encoder: Encoder, samples: Sequence[Sample], max_tokens: int, batch: int = 128, label: str = "answering") -> list[Generated]:
    """The greedy answer to every sample, in the order of `samples`."""
    sampling, family = dataclasses.replace(GREEDY, max_tokens=max_tokens), family_of(model.config.model_type)
    found: dict[str, Generated] = {}
    for group in bar(list(batches_by_length(samples, encoder, batch)), label):
        answers = generate(model, encoder, family.collate_pixels, group, 1, sampling)
        found.update({sample.id: answer for sample, [answer] in zip(group, answers, strict=True)})
    return [found[sample.id] for sample in samples]


def scores(samples: Sequence[Sample], answers: Sequence[Generated]) -> list[float]:
    """The score in [0, 1] of each answer, by its sample's metric."""
    return [score(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)]
