"""Qwen2.5-VL: rotary positions in three axes (time, height, width), images as rows of patches with the grid of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import default
from .default import LANGUAGE

VISION = ("model.visual.",)
PROJECTOR = ("model.visual.merger.",)

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "patch_pairs", "positions"]


def collate_pixels(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Patches and grids of all images in a row. The kinds of tokens serve the model to find positions, which it is given here."""
    return default.collate_pixels([{name: t for name, t in row.items() if name != "mm_token_type_ids"} for row in rows])


def patch_pairs(pixels: dict[str, Tensor], vision: Any, patches: int) -> float:
    """Pairs of patches that look at each other in a layer, on average: all of one picture in some layers, those of a window in the others."""
    whole = sum(time * (height * width) ** 2 for time, height, width in pixels["image_grid_thw"].tolist())
    share = len(vision.fullatt_block_indexes) / vision.depth
    return float(share * whole + (1 - share) * patches * (vision.window_size // vision.patch_size) ** 2)


def positions(ids: Tensor, pixels: dict[str, Tensor], processor: Any) -> Tensor:
    """The rotary positions [3, P] of a prompt's tokens `ids` [P]: text counts on in all axes alike, an image spans a box.

    What follows an image counts on from the box's longest side.
    """
    merge = processor.image_processor.merge_size
    spans, read, place = [], 0, 0
    starts = (ids == processor.image_token_id).nonzero()[:, 0]
    for time, height, width in pixels.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist():
        start = int(starts[starts >= read][0])
        box = torch.cartesian_prod(*(torch.arange(size) for size in (time, height // merge, width // merge))).T
        spans += [_text(start - read, place), box + place + start - read]
        place += start - read + max(time, height // merge, width // merge)
        read = start + box.shape[1]
    return torch.cat([*spans, _text(len(ids) - read, place)], dim=1)


def _text(count: int, place: int) -> Tensor:
    return torch.arange(place, place + count).expand(3, -1)
