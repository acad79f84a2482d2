"""Idefics3 and SmolVLM: what differs from other families when a teacher is distilled into a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from .default import patch_pairs, positions

# Module name patterns, relative to the model that AutoModelForImageTextToText returns.
LANGUAGE = ("model.text_model.layers.",)
VISION = ("model.vision_model.",)
PROJECTOR = ("model.connector.",)

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "check_images", "collate_pixels", "patch_pairs", "positions"]


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


def check_images(folder: Path, processor: Any, config: Any) -> None:
    """Raise ModelError unless the processor writes as many image tokens for a tile as the tower and its pixel shuffle leave."""
    vision = config.vision_config
    made = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    if processor.image_seq_len != made:
        raise ModelError(f"the processor in {folder} writes {processor.image_seq_len} image tokens a tile, its model makes {made}; mend its image_seq_len")
