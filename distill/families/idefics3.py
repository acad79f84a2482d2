"""Idefics3 and SmolVLM: what differs from other families when a teacher is distilled into a student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .default import positions

# Module name patterns, relative to the model that AutoModelForImageTextToText returns.
LANGUAGE = ("model.text_model.layers.",)
VISION = ("model.vision_model.",)
PROJECTOR = ("model.connector.",)

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "positions"]


def collate_pixels(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tiles [1, T_i, 3, H, W] and their masks of several prompts as one batch [B, max T, 3, H, W].

    The model drops padding tiles itself: they are all zero, which no real tile is. A prompt without an image is all padding.
    """
    shown = [row for row in rows if row]
    if not shown:
        return {}
    batch = {}
    for name, kind in (("pixel_values", torch.float32), ("pixel_attention_mask", torch.bool)):
        shapes = [row[name].shape for row in shown]
        largest = [max(sizes) for sizes in zip(*(shape[1:] for shape in shapes), strict=True)]
        whole = torch.zeros((len(rows), *largest), dtype=kind)
        for i, row in enumerate(rows):
            if row:
                tiles = row[name][0].to(kind)
                whole[i][tuple(slice(size) for size in tiles.shape)] = tiles
        batch[name] = whole
    return batch
