"""LLaVA-OneVision: an image alone comes in tiles, as many as its shape asks for; several together come whole, one tile each."""

from __future__ import annotations

from .default import LANGUAGE, collate_pixels, patch_pairs, positions

VISION = ("model.vision_tower.",)
PROJECTOR = ("model.multi_modal_projector.", "model.image_newline")

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "patch_pairs", "positions"]
