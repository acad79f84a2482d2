"""`--precision auto`: what each weight is stored as, under a budget of bytes or of divergence, from what each was measured to cost.

All weights start as float16; then the one change that costs least divergence for the bytes it saves is made, and the next, down to int4 everywhere.
These changes are a path, and a budget is a place on it. What weights cost alone adds up only roughly, so there are several paths, one of which ends at int8
everywhere and one at int4 with fine blocks; where they reach the budget, each is measured with all its weights so stored at once, and the best is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import MastersError
from ..runtime.session import Vlm
from .calibration import Asked, divergence, mean_divergence
from .parity import forced_logits
from .precision import Precision, Storage, coarsest
from .products import Product, all_products, stored_as
from .reference import Reference
from .sensitivity import FINE, HALF, Choice, measure_sensitivity
from .source import Source


@dataclass(frozen=True)
class Budget:
    """What a bundle may be: its bytes in all, or the mean KL divergence of its answers from the student's, in nats a token."""

    max_bytes: int | None = None
    max_kl: float | None = None


@dataclass(frozen=True)
class Search:
    """Every choice that was measured, and the changes from float16 on, in the order in which they are made; a place on it is how many are made."""

    choices: tuple[Choice, ...]
    changes: tuple[Choice, ...]

    def plan(self, place: int) -> dict[Product, Storage]:
        """What each product is stored as at a place."""
        start = {choice.product: HALF for choice in self.choices}
        return start | {choice.product: choice.storage for choice in self.changes[:place]}

    @cached_property
    def bytes(self) -> tuple[int, ...]:
        """What all products take, at each place."""
        now = {choice.product: choice.bytes for choice in self.choices if choice.storage == HALF}
        saved = []
        for change in self.changes:
            saved.append(change.bytes - now[change.product])
            now[change.product] = change.bytes
        return tuple(accumulate(saved, initial=sum(now.values()) - sum(saved)))

    def within(self, limit: float) -> int | None:
        """The first place at which the products take at most `limit` bytes; None where there is none."""
        return next((place for place, size in enumerate(self.bytes) if size <= limit), None)


def search(source: Source, questions: Sequence[Asked], int4: Storage) -> list[Search]:
    """Measure every weight of the model, and order the changes; `int4` is what int4 is to be like, but for its blocks.

    The first path makes all changes there are, the others leave out coarse blocks, and int4.
    """
    choices = measure_sensitivity(source, all_products(source.model, source.family), questions, int4)
    fine = [choice for choice in choices if choice.storage.word != "int4" or choice.storage.block_size == FINE]
    eight = [choice for choice in choices if choice.storage.word != "int4"]
    return [Search(tuple(choices), order_changes(ways)) for ways in (choices, fine, eight)]


def order_changes(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The changes worth making, cheapest first: of each product those on the lower convex hull of divergence over bytes, so that no later one is cheaper."""
    by_product: dict[Product, list[Choice]] = {}
    for choice in sorted(choices, key=lambda choice: -choice.bytes):
        by_product.setdefault(choice.product, []).append(choice)
    changes = []
    for of_one in by_product.values():
        hull = _lower_hull(of_one)
        changes += [(_slope(before, after), after) for before, after in pairwise(hull)]
    return tuple(change for _, change in sorted(changes, key=lambda priced: priced[0]))


def begin(paths: Sequence[Search], source: Source, questions: Sequence[Asked], budget: Budget, overhead: int) -> tuple[Search, int]:
    """The path and the place on it at which to begin: under `max_bytes`, `overhead` of which is not the products', the one with the least divergence of those
    that fit; under `max_kl` the smallest of those that keep it. Raises MastersError for a number of bytes that no place keeps."""
    if budget.max_bytes is None:
        assert budget.max_kl is not None
        kept = [(path, _last_within(path, source, questions, budget.max_kl)) for path in paths]
        return min(kept, key=lambda found: found[0].bytes[found[1]])
    fitting = [(path, place) for path in paths if (place := path.within(budget.max_bytes - overhead)) is not None]
    if not fitting:
        least = min(path.bytes[-1] for path in paths) + overhead
        raise MastersError(f"{budget.max_bytes:,} bytes are too few: int4 everywhere takes {least:,}; allow that many, or distil a smaller student")
    return min(fitting, key=lambda found: divergence_of(found[0].plan(found[1]), source, questions)) if len(fitting) > 1 else fitting[0]


def divergence_of(plan: Mapping[Product, Storage], source: Source, questions: Sequence[Asked]) -> float:
    """Of PyTorch with all products stored as planned, at once."""
    with stored_as(plan):
        return mean_divergence(source, questions)


def _last_within(found: Search, source: Source, questions: Sequence[Asked], max_kl: float) -> int:
    """The last place that keeps a divergence, or 0."""
    low, high = 0, len(found.changes)
    while low < high:  # low is kept, or 0; what lies above high is not
        middle = (low + high + 1) // 2
        kept = divergence_of(found.plan(middle), source, questions) <= max_kl
        low, high = (middle, high) if kept else (low, middle - 1)
    return low


def next_place(paths: Sequence[Search], found: Search, place: int, budget: Budget, size: int, measured: float) -> tuple[Search, int] | None:
    """None if a bundle of `size` bytes and `measured` divergence keeps the budget, else the place to try next, on the path `found` if one is left there.

    Raises MastersError if there is none.
    """
    if budget.max_bytes is not None and size > budget.max_bytes:
        overhead = size - found.bytes[place]
        for path in (found, *paths):
            if (following := path.within(budget.max_bytes - overhead)) is not None:
                return path, following
        least = min(path.bytes[-1] for path in paths) + overhead
        raise MastersError(f"{budget.max_bytes:,} bytes are too few: int4 everywhere takes {least:,}; allow that many")
    if budget.max_kl is not None and measured > budget.max_kl:
        if place == 0:
            raise MastersError(f"a divergence of {budget.max_kl:g} can't be kept: float16 everywhere has {measured:.3g}; allow more, or export fp32")
        return found, place - max(1, place // 16)
    return None


def with_plan(precision: Precision, plan: Mapping[Product, Storage]) -> Precision:
    """`precision` with each weight stored as planned. A part is called by its coarsest weight; one of float16 weights alone computes in float32 and is called
    so, but for the embedding, which computes nothing."""
    words = {part: coarsest([storage.word for product, storage in plan.items() if product.part == part]) for part in ("vision", "embed", "decoder")}
    for part in ("vision", "decoder"):
        words[part] = "fp32" if words[part] == "fp16" else words[part]
    return replace(precision, **words, layers={str(product): storage for product, storage in plan.items()})  # type: ignore[arg-type]


def bundle_divergence(vlm: Vlm, questions: Sequence[Asked]) -> float:
    """Mean KL divergence of the bundle's answers from the student's, from the image files on."""
    total = 0.0
    for asked in questions:
        images = asked.sample.images
        pixels = vlm.see(images, vlm.shown_alone(len(images)))
        width = vlm.parts.embed(asked.prompt.ids[:1]).shape[-1]
        features = np.concatenate([np.zeros((0, width), np.float32), *(vlm.encode(picture) for picture in pixels)])
        reference = Reference(asked.sample.id, b"", asked.sample.prompt, asked.prompt, features, features, asked.log_probabilities.numpy(), asked.tokens)
        logits = forced_logits(vlm, reference, features, [grid for picture in pixels for grid in picture.grids])
        total += divergence(asked, torch.from_numpy(logits))
    return total / len(questions)


def report(found: Search, place: int, budget: Budget, size: int, measured: float, questions: int) -> dict[str, Any]:
    """What was decided and from what, as an entry for the manifest's checks."""
    return {
        "kind": "precision",
        "budget": {"max_bytes": budget.max_bytes, "max_kl": budget.max_kl},
        "bytes": size,
        "kl": measured,
        "questions": questions,
        "stored": {str(product): str(storage) for product, storage in found.plan(place).items()},
        "sensitivity": [choice.to_json() for choice in found.choices if choice.storage != HALF],
    }


def summary(entry: Mapping[str, Any], most: int = 5) -> str:
    """A report in a few lines: how many weights are stored as what, and the most sensitive ones."""
    counts: dict[str, int] = {}
    for storage in entry["stored"].values():
        counts[storage] = counts.get(storage, 0) + 1
    lines = [f"{entry['bytes']:,} bytes, KL {entry['kl']:.2g}: " + ", ".join(f"{count} weights {storage}" for storage, count in sorted(counts.items()))]
    worst: dict[str, float] = {}
    for row in entry["sensitivity"]:
        worst[row["weight"]] = max(worst.get(row["weight"], 0.0), row["kl"])
    for weight in sorted(worst, key=lambda name: -worst[name])[:most]:
        lines.append(f"  {weight}: KL {worst[weight]:.2g} at the coarsest, stored as {entry['stored'][weight]}")
    return "\n".join(lines)


def _lower_hull(points: Sequence[Choice]) -> list[Choice]:
    hull: list[Choice] = []
    for point in points:  # from large to small
        if hull and point.bytes == hull[-1].bytes:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: Choice, after: Choice) -> float:
    """Divergence for each byte saved."""
    return (after.divergence - before.divergence) / (before.bytes - after.bytes)
