"""What models read and write, in numbers: tokens, patches, and pairs of which one looks at the other. Operations follow from it (flops.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

from .families import family_of
from .inputs import Prompt


@dataclass(frozen=True)
class Reading:
    """What a model reads: tokens, pairs of which one looks at the other, rows of logits, patches of images, and pairs of these."""

    tokens: float = 0
    pairs: float = 0
    logits: float = 0
    patches: float = 0
    patch_pairs: float = 0

    def __add__(self, other: Reading) -> Reading:
        return Reading(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, factor: float) -> Reading:
        """So many times this."""
        return Reading(*(factor * value for value in astuple(self)))


def prompt_reading(prompt: Prompt, config: Any) -> Reading:
    """One prompt, with its images; no logits."""
    vision = getattr(config, "vision_config", None)
    tokens = len(prompt.ids)
    if vision is None or not prompt.pictured:
        return Reading(tokens, tokens**2)
    patches = patches_of(prompt.pixels, config)
    return Reading(tokens, tokens**2, 0, patches, family_of(config.model_type).patch_pairs(prompt.pixels, vision, patches))


def packed(prompt: Reading, lengths: Iterable[float]) -> Reading:
    """A question with its answers of so many tokens behind one prompt, each blind to the others; their last tokens are not read."""
    read = [(length - 1, length) for length in lengths]
    tokens = sum(n for n, _ in read)
    return prompt + Reading(tokens, sum(n * (prompt.tokens + n) for n, _ in read), sum(length for _, length in read))


def behind(prompt: Reading, lengths: Sequence[int], shared: bool) -> Reading:
    """`packed`, or, where answers do not share a prompt, each with a prompt of its own."""
    return packed(prompt, lengths) if shared else total([packed(prompt, [length]) for length in lengths])


def answered(prompt: Reading, lengths: Iterable[float]) -> Reading:
    """A prompt read once, and answers of so many tokens generated on its cache, one token a time; the last ones are not read."""
    found = prompt + Reading(logits=1)
    for length in lengths:
        steps = max(0, length - 1)
        found += Reading(steps, steps * prompt.tokens + steps * (steps + 1) / 2, steps)
    return found


def patches_of(pixels: dict[str, Tensor], config: Any) -> int:
    """How many patches the tower reads of a prompt's image tensors."""
    vision = config.vision_config
    side = vision.patch_size[0] if isinstance(vision.patch_size, list | tuple) else vision.patch_size
    each = 3 * side**2 * getattr(vision, "temporal_patch_size", 1)
    return math.ceil(sum(t.numel() for name, t in pixels.items() if name.startswith("pixel_values")) / each)


def total(readings: Sequence[Reading]) -> Reading:
    """Their sum."""
    found = Reading()
    for reading in readings:
        found += reading
    return found
