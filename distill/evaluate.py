"""Scoring a model on questions: greedy answers, one score each."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from ..progress import bar
from ..samples import Sample
from ..scoring import score
from . import ranks
from .families import family_of
from .generate import GREEDY, Generated, batches_by_length, generate, generate_own
from .inputs import Encoder


def greedy_answers(model: Any, encoder: Encoder, samples: Sequence[Sample], max_tokens: int, batch: int = 128, label: str = "answering") -> list[Generated]:
    """The greedy answer to every sample, in the order of `samples`."""
    sampling, family = dataclasses.replace(GREEDY, max_tokens=max_tokens), family_of(model.config.model_type)
    found: dict[str, Generated] = {}
    for group in bar(list(batches_by_length(samples, batch * ranks.count())), label):
        mine = group[ranks.index() :: ranks.count()]
        answers = generate_own(model, encoder, family.collate_pixels, mine, 1, sampling)
        for part in ranks.gathered({sample.id: answer for sample, [answer] in zip(mine, answers, strict=True)}):
            found.update(part)
    return [found[sample.id] for sample in samples]


def measure_latency(model: Any, encoder: Encoder, samples: Sequence[Sample], max_tokens: int) -> tuple[float, float | None]:
    """Median milliseconds to the first token, image preprocessing included, and for each token after it, one question at a time."""
    family = family_of(model.config.model_type)
    first, later = [], []
    # The first question warms up.
    for number, sample in enumerate((samples[0], *samples)):
        fresh = Encoder(encoder.processor, encoder.longest, positions=encoder.positions)
        started = time.perf_counter()
        generate(model, fresh, family.collate_pixels, [sample], 1, dataclasses.replace(GREEDY, max_tokens=1))
        middle = time.perf_counter()
        [[answer]] = generate(model, encoder, family.collate_pixels, [sample], 1, dataclasses.replace(GREEDY, max_tokens=1))
        again = time.perf_counter()
        [[answer]] = generate(model, encoder, family.collate_pixels, [sample], 1, dataclasses.replace(GREEDY, max_tokens=max_tokens))
        ended = time.perf_counter()
        if number:
            first.append(1000 * (middle - started))
            later += [1000 * ((ended - again) - (again - middle)) / (len(answer.ids) - 1)] if len(answer.ids) > 1 else []
    return statistics.median(first), statistics.median(later) if later else None


def scores(samples: Sequence[Sample], answers: Sequence[Generated]) -> list[float]:
    """The score in [0, 1] of each answer, by its sample's metric."""
    return [score(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)]
