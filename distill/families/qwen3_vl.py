"""Qwen3-VL: Qwen2.5-VL's positions and patches; the tower's middle layers reach the language model through mergers of their own."""

from __future__ import annotations

from .qwen2_5_vl import LANGUAGE, VISION, collate_pixels, positions

PROJECTOR = ("model.visual.merger.", "model.visual.deepstack_merger_list.")

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "positions"]
