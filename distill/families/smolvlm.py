"""SmolVLM: Idefics3 under another name, with the same modules and the same image tensors."""

from __future__ import annotations

from .idefics3 import LANGUAGE, PROJECTOR, VISION, check_images, collate_pixels, patch_pairs, positions

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "check_images", "collate_pixels", "patch_pairs", "positions"]
