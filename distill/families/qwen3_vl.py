"""Qwen3-VL: Qwen2.5-VL's positions and patches; the tower's middle layers reach the language model through mergers of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .qwen2_5_vl import LANGUAGE, VISION, collate_pixels, positions

PROJECTOR = ("model.visual.merger.", "model.visual.deepstack_merger_list.")

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "patch_pairs", "positions"]


def patch_pairs(pixels: dict[str, Tensor], vision: Any, patches: int) -> float:
    """Pairs of patches that look at each other in a layer: all of one picture."""
    return float(sum(time * (height * width) ** 2 for time, height, width in pixels["image_grid_thw"].tolist()))
