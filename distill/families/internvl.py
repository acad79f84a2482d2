"""InternVL3 and 3.5 in the class that is transformers' own: the language model is Qwen2 or Qwen3, images are rows of tiles."""

from __future__ import annotations

from .default import LANGUAGE, collate_pixels, patch_pairs, positions

VISION = ("model.vision_tower.",)
PROJECTOR = ("model.multi_modal_projector.",)

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "patch_pairs", "positions"]
