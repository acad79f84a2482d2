"""Golden tensors: one image and question with PyTorch's own numbers, by which a device tests itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import whole_file
from ..runtime.session import Vlm
from .parity import forced_logits, largest_difference
from .reference import Reference

GOLDEN = "golden.npz"
PNG = b"\x89PNG"
# What another processor's kernels may add to the difference measured here: as much again, and rounding in float32.
MARGIN, FLOOR = 2.0, 1e-3
PIXELS = 1e-4
LIGHT = 6 * 3 * 512 * 512  # numbers of pixel_values: six tiles of SmolVLM


def smallest(references: Sequence[Reference]) -> Reference:
    """The one whose image becomes the fewest pixels, of those that every decoder reads alike: a device tests itself each time that it opens the bundle."""
    alike = [reference for reference in references if reference.image.startswith(PNG)] or list(references)
    return min(alike, key=_pixels)


def lightest(references: Sequence[Reference]) -> list[Reference]:
    """Those with the fewest pixels, as many as a large model goes through in seconds, one at least; all of a small model's."""
    ordered = sorted(references, key=_pixels)
    sums = np.cumsum([_pixels(reference) for reference in ordered])
    return ordered[: max(1, int((sums <= LIGHT).sum()))]


def write_golden(path: Path, vlm: Vlm, reference: Reference) -> None:
    """Write `reference` with the tolerances that `vlm`, the bundle on this machine, needs; the same input gives the same bytes."""
    pixels = vlm.see([reference.image])[0]
    features = vlm.encode(pixels)
    logits = forced_logits(vlm, reference, features, pixels.grids)
    # Where the bundle prefers another token, the golden one's logit lies below its highest; the self-test allows twice the logits' tolerance.
    shortfall = max(float(row.max() - row[token]) for row, token in zip(logits, reference.tokens, strict=True))
    tolerance = {
        "pixel_values": PIXELS,
        "image_features": MARGIN * largest_difference(features, reference.features) + FLOOR,
        "logits": max(MARGIN * largest_difference(logits, reference.logits), shortfall) + FLOOR,
    }
    arrays = {
        "image": np.frombuffer(reference.image, np.uint8),
        "question": np.array(reference.question),
        "pixel_values": pixels.values,
        "image_features": reference.features,
        "logits": reference.logits[0],
        "tokens": reference.tokens,
        "tolerance": np.array(json.dumps(tolerance)),
    }
    # numpy stamps every member with 1980, so the bytes depend on the arrays alone.
    with whole_file(path) as part:
        np.savez_compressed(part, **arrays)  # the pixels of tiles are most of it, and drawn ones nearly vanish


def _pixels(reference: Reference) -> int:
    return reference.prompt.pixels["pixel_values"].numel()
